"""Charts that a process of their own draws."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import psutil
import pytest

from disttrain.tracking.mlflow import sender_process
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


def test_who_hears_the_sender_out_does_not_wait_for_its_charts(tmp_path: Path) -> None:
    """Here they never get on: their process is stopped."""
    settings = json.dumps({"run_dir": str(tmp_path), "uri": "http://127.0.0.1:9", "experiment": "", "run_name": ""})
    start = f"from {sender_process.__name__} import main; main()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", start], stdin=pipe, stdout=pipe, stderr=pipe) as sender:
        assert sender.stdin is not None
        sender.stdin.write(settings.encode() + b"\n")
        sender.stdin.flush()
        deadline, drawing = time.monotonic() + 60, list[psutil.Process]()
        while not drawing or os.readlink(f"/proc/{drawing[0].pid}/fd/2") != os.devnull:  # it has let go of ours
            assert time.monotonic() < deadline
            time.sleep(0.01)
            drawing = psutil.Process(sender.pid).children()
        drawing[0].suspend()
        sender.kill()
        try:
            sender.communicate(timeout=60)  # up to the end of its output, which no other process may hold
        finally:
            drawing[0].kill()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_run_that_was_killed_is_marked_before_anybody_draws_what_it_owes(tmp_path: Path, is_killed: bool) -> None:
    """Its sender has three seconds left, and drawing may take them: the next start draws."""
    delivery, charts = Mock(uri="http://127.0.0.1:9"), Mock()
    orders: Any = SimpleNamespace(over=True, hurried=True, abandoned=is_killed)
    sender_process.Sender(delivery, orders, Mock(), tmp_path, charts).run()
    marked = [call.mark_killed()] if is_killed else []
    assert delivery.mock_calls == [call.deliver(charts=not is_killed), *marked]
    assert charts.mock_calls == []


@pytest.mark.parametrize("num_bytes", [100, 100_000])
def test_a_journal_that_grows_fast_is_sent_more_often(tmp_path: Path, num_bytes: int) -> None:
    """What is left of it when training ends would be waited for."""
    (tmp_path / "journal.jsonl").write_bytes(b"x" * num_bytes)
    delivery, done = Mock(uri="http://127.0.0.1:9", offset=0), list[str]()
    orders: Any = SimpleNamespace(over=False, hurried=False, abandoned=False, wait=Mock())

    def deliver(*, charts: bool) -> None:
        done.append("sent")
        orders.over = orders.hurried = len(done) == 3

    def wait(timeout_s: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            done.append("waited")
            orders.over = orders.hurried = len(done) == 3

    delivery.deliver.side_effect, orders.wait_beside_training = deliver, wait
    sender_process.Sender(delivery, orders, Mock(), tmp_path, Mock()).run()
    assert done[:3] == (["sent", "waited", "sent"] if num_bytes > 10_000 else ["sent", "waited", "waited"])
