"""The comparison of ways to meet, with workers that only write down what they are asked to train."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from disttrain.testing import WorkerFailed


class Noting:
    """Workers of which the first run diverges."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def run(self, function: Any, recipe: str, overrides: list[str], run_dir: Path) -> list[dict[str, float]]:
        """As `Group.run` has it."""
        self.folders.append(run_dir)
        if len(self.folders) == 1:
            raise WorkerFailed("diverged", rank=0)
        return [{"accuracy": 0.5}]


def test_after_a_run_that_diverged_the_next_one_does_not_resume_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    accuracy = importlib.import_module("accuracy")
    group = Noting()

    @contextmanager
    def workers(*_: Any, **__: Any) -> Iterator[Noting]:
        yield group

    monkeypatch.setattr(accuracy, "workers", workers)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", "0", "1", "--ways", "every 50"])
    accuracy.main()
    assert len(set(group.folders)) == len(group.folders) == 4
    assert "float32, seed 0: diverged" in capsys.readouterr().out
