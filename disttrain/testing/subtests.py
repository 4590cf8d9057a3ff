"""Reports that a test makes while it runs, as the `subtests` fixture does, on their way from the workers to pytest.

They go through a file of each rank, not with the answer to a command: a rank whose subtest failed may well hang next,
and then the report shows why.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

_PLAIN = (str, int, float, bool, type(None))


def keep(config: pytest.Config, report: pytest.TestReport, directory: Path, rank: int) -> None:
    """In a worker: store a report for the session at home."""
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    context = _context(data)
    context["kwargs"] = {
        name: value if isinstance(value, _PLAIN) else repr(value) for name, value in context.get("kwargs", {}).items()
    }
    context["kwargs"]["rank"] = rank
    with _path(directory, rank).open("ab") as file:
        pickle.dump(data, file)


def take(config: pytest.Config, directory: Path, rank: int) -> Iterator[pytest.TestReport]:
    """At home: the reports that a rank has stored since the last time."""
    path = _path(directory, rank)
    if not path.exists():
        return
    with path.open("rb") as file:
        while True:
            try:
                data = pickle.load(file)
            except (EOFError, pickle.UnpicklingError):  # the end, or the rank was killed as it wrote
                break
            yield config.hook.pytest_report_from_serializable(config=config, data=data)
    path.unlink()


def log(item: pytest.Item, report: pytest.TestReport) -> None:
    """At home: have pytest show and count a report in the middle of a test, when what is printed is captured."""
    capture = item.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        item.ihook.pytest_runtest_logreport(report=report)


def _context(data: dict[str, Any]) -> dict[str, Any]:
    """A subtest's own description: `msg` and `kwargs`. Both of pytest's implementations call it that."""
    context: dict[str, Any] = data.get("_subtest.context", {})
    return context


def _path(directory: Path, rank: int) -> Path:
    return directory / f"reports-of-rank-{rank}"
