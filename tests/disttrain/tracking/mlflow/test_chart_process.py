"""Charts that a process of their own draws."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import psutil
import pytest

from disttrain.tracking.mlflow.chart_process import ChartProcess


def test_charts_are_drawn_by_another_process_or_without_it_here(tmp_path: Path) -> None:
    """It draws what there is when it is asked, says why it cannot, and is not needed."""
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text("no JSON")
    known = set(psutil.Process().children())
    charts = ChartProcess(tmp_path)
    (process,) = set(psutil.Process().children()) - known
    charts.begin()
    with pytest.raises(RuntimeError, match="Expecting value"):
        charts.drawn()
    evaluation.write_text(json.dumps({"classes": ["cat", "dog"], "per_class": {"cat": 1.0, "dog": 0.5}}))
    chart = tmp_path / "charts" / "per_class.png"
    assert charts.drawn() == [chart]
    process.kill()
    process.wait()
    chart.unlink()
    charts.begin()
    assert charts.drawn() == [chart]
    assert chart.is_file()


def test_where_there_can_be_no_more_processes_this_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    charts = ChartProcess(tmp_path)
    charts.begin()
    assert charts.drawn() == []


def test_the_process_ends_with_the_one_that_wants_charts(tmp_path: Path) -> None:
    known = set(psutil.Process().children())
    charts = ChartProcess(tmp_path)
    (process,) = set(psutil.Process().children()) - known
    del charts
    assert process.wait(60) == 0
