"""How a worker's process ends."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch.distributed as dist

from disttrain import __main__ as program
from disttrain.distributed import report as report_module
from disttrain.distributed.collectives import broadcast_from_main, one_per_machine_first
from disttrain.distributed.report import says_finished
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, PeerError, failure_in
from disttrain.recipe.reference import import_callable
from disttrain.worker import worker

_ENDS_WITH_7 = """
import atexit, concurrent.futures, sys, threading, time
from disttrain.worker import leave

def late() -> None:
    time.sleep(0.2)
    print("thread done")

atexit.register(print, "handler run")
{thread}
leave(7)
"""


def _ending(thread: str) -> tuple[int, list[str]]:
    code = _ENDS_WITH_7.format(thread=thread)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout.splitlines()


def test_handlers_are_run_and_output_is_flushed_before_a_quick_end() -> None:
    assert _ending("") == (7, ["handler run"])


def test_threads_that_python_waits_for_are_waited_for() -> None:
    pool = "concurrent.futures.ThreadPoolExecutor().submit(late)"
    assert _ending(pool) == (7, ["thread done", "handler run"])


def test_code_that_leaves_in_the_middle_has_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it leaves with, 0 included; and whoever comes to the end says so."""
    report = tmp_path / "report.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setattr(report_module, "launched_by", lambda: "disttrain")
    monkeypatch.setattr(sys, "argv", ["train"])
    assert worker(click.Command("train", callback=lambda: sys.exit(0))) == 1
    assert "test_worker.py" in json.loads(report.read_text())["message"]
    assert "called sys.exit(0) before the work was done" in json.loads(report.read_text())["message"]
    assert not says_finished(report)
    assert worker(click.Command("train", callback=lambda: None)) == 0
    assert says_finished(report)


def test_torchrun_is_left_no_file_of_a_worker_that_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "report.json"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.delenv("DISTTRAIN_LAUNCHER", raising=False)
    monkeypatch.setattr(sys, "argv", ["train"])
    assert worker(click.Command("train", callback=lambda: None)) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed(world_size=2, process_group=False)
def test_a_failure_is_reported_before_the_goodbye_that_may_never_end(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's waits for what the other ranks have not joined; so it is left out."""
    left: list[Any] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda *group: left.append(group))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"report-{rank}.json"))
    options = ["-o", "data.dataset=folder", "-o", f"data.root={tmp_path}/nowhere", "-o", "train.device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train", "digits", *options, "--run-dir", str(tmp_path.parent / "run")])
    assert worker(program.command) == 78
    assert dist.is_initialized()
    assert json.loads((tmp_path / f"report-{rank}.json").read_text())["rank"] == rank
    assert () not in left, "the group of all"


def _stumble() -> None:
    [][3]


def test_the_rank_whose_own_code_fails_is_the_one_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reports its traceback; what the others learn of it is a consequence, however early they report it."""
    report = tmp_path / "report.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setattr(sys, "argv", ["train"])

    def fails(error: Exception) -> dict[str, Any]:
        def callback() -> None:
            raise error

        assert worker(click.Command("train", callback=callback)) == 1
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    try:
        _stumble()
    except IndexError as error:
        own = failure_in("sample 3", error)
    sent = pickle.loads(pickle.dumps(own))  # as from a process that reads data
    line = _stumble.__code__.co_firstlineno + 1
    for found in (fails(own), fails(sent)):
        assert found["message"] == f"sample 3: IndexError: list index out of range ({__file__}:{line})"
        assert "in _stumble" in found["traceback"]
        assert not found["consequence"]
    assert fails(PeerError("rank 0 failed: IndexError"))["consequence"]


@pytest.mark.distributed(world_size=2, process_group=False)
def test_a_failure_elsewhere_is_known_as_such() -> None:

    def prepare() -> None:
        with one_per_machine_first(world):
            _stumble()

    with join_world("cpu", threads=1) as world:
        for way in (prepare, lambda: broadcast_from_main(world, _stumble)):
            with pytest.raises((PeerError, IndexError)) as caught:
                way()
            assert caught.type is (IndexError if world.is_main else PeerError)
            assert world.is_main or str(caught.value) == "rank 0 failed: IndexError: list index out of range"


def test_a_module_that_calls_sys_exit_is_refused_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving_at_import.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(ConfigurationError, match=r"^model.name: importing 'leaving_at_import' calls sys.exit\(0\)"):
        import_callable("leaving_at_import:build", "model.name")
