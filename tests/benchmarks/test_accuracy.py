"""The comparison of ways to meet, with workers that only write down what they are asked to train."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import DivergedError
from disttrain.testing import WorkerFailed


class Noting:
    """Workers of which the first run ends with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.folders: list[Path] = []

    def run(self, function: Any, recipe: str, overrides: list[str], run_dir: Path) -> list[dict[str, float]]:
        """As `Group.run` has it."""
        self.folders.append(run_dir)
        if len(self.folders) == 1:
            raise WorkerFailed("step 3", rank=0, cause=self.error)
        return [{"accuracy": 0.5}]


@pytest.mark.parametrize(("error", "code"), [(DivergedError("loss"), None), (MemoryError(), "failed: float32, seed 0")])
def test_after_a_run_that_diverged_or_failed_the_next_one_does_not_resume_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: str | None
) -> None:
    """To diverge is a result; what failed is named at the end."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    accuracy = importlib.import_module("accuracy")
    group = Noting(error)

    @contextmanager
    def workers(*_: Any, **__: Any) -> Iterator[Noting]:
        yield group

    monkeypatch.setattr(accuracy, "workers", workers)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", "0", "1", "--ways", "every 50"])
    with nullcontext() if code is None else pytest.raises(SystemExit) as ended:
        accuracy.main()
    assert (ended and ended.value.code) == code
    assert len(set(group.folders)) == len(group.folders) == 4
    assert f"float32, seed 0: {'failed' if code else 'diverged'}: step 3\n" in capsys.readouterr().out
