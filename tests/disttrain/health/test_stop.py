"""Requests to stop, by signal or by file, at any process and at any moment: all ranks save at one step."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disttrain.checkpoint import CheckpointStore
from disttrain.errors import StoppedError
from disttrain.runs.journal import read_journal
from disttrain.testing import faults, workers
from disttrain.testing.faults import Fault
from disttrain.testing.group import Outcome
from tests.disttrain.parallel.exact_runs import outcome, train

EPOCHS = "train.epochs=4"


def job(run_dir: Path, *overrides: str) -> None:
    train(run_dir, *(overrides or (EPOCHS,)))


def attempt(run_dir: Path, world_size: int, *injuries: Fault, overrides: tuple[str, ...] = ()) -> list[Outcome]:
    with workers(world_size, faults=injuries, process_group=False, check_collectives=False, timeout_s=480) as group:
        return group.attempt(job, run_dir, *overrides)


def newest_step(run_dir: Path) -> int:
    return int(CheckpointStore(run_dir / "checkpoints").paths()[-1].name.removeprefix("step-"))


def words_of_all(outcomes: list[Outcome]) -> str:
    """The ranks were all stopped, and say so in the same words but for who was asked."""
    for of_rank in outcomes:
        assert isinstance(of_rank.error, StoppedError), of_rank.text
    steps = {str(of_rank.error).partition(" after ")[2] for of_rank in outcomes}
    assert len(steps) == 1
    return steps.pop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [of_rank.state for of_rank in attempt(run_dir, 1)] == ["returned"]
    return run_dir


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(rank, number, marks=() if number is SIGNALS[rank] else pytest.mark.long)
        for rank in range(3)
        for number in SIGNALS
    ],
)
def test_a_signal_to_any_one_rank_stops_all_at_the_same_step(
    tmp_path: Path, undisturbed: Path, rank: int, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    said = words_of_all(attempt(run_dir, 3, faults.send(rank, number, step=7)))
    step = newest_step(run_dir)
    assert said.startswith(f"step {step} of 20; the checkpoint is saved. Resume with: disttrain train --run-dir ")
    assert 7 < step <= 9
    assert [of_rank.state for of_rank in attempt(run_dir, 2)] == ["returned"] * 2
    assert outcome(run_dir) == outcome(undisturbed)


@pytest.mark.parametrize(
    "moment", [{"at": "start"}, {"at": "evaluation"}, {"at": "checkpoint: tensors"}, {"step": 19}], ids=str
)
def test_at_any_moment(tmp_path: Path, undisturbed: Path, moment: dict[str, int | str]) -> None:
    """While it starts, evaluates or writes a checkpoint, and in its very last step."""
    run_dir = tmp_path / "run"
    words_of_all(attempt(run_dir, 2, faults.terminate(0, **moment)))
    assert [of_rank.state for of_rank in attempt(run_dir, 1)] == ["returned"]
    assert outcome(run_dir) == outcome(undisturbed)


@contextlib.contextmanager
def once(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something from outside while the block runs, as soon as the condition holds."""
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.02):
            if condition():
                act()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def has_made_a_step(run_dir: Path) -> bool:
    return (run_dir / "journal.jsonl").exists() and "train/loss" in (run_dir / "journal.jsonl").read_text()


def test_the_stop_file_stops_all_and_is_gone_then(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = ("train.epochs=100000",)
    with once(lambda: has_made_a_step(run_dir), (run_dir / "stop").touch):
        words_of_all(attempt(run_dir, 2, overrides=endless))
    assert not (run_dir / "stop").exists()
    events = [record for record in read_journal(run_dir / "journal.jsonl") if record.get("name") == "stopped"]
    assert f"stopped on request (the file {run_dir / 'stop'})" in events[-1]["reason"]


def test_a_stop_file_from_before_the_start_stops_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words_of_all(attempt(run_dir, 1, faults.terminate(0, step=2)))
    (run_dir / "stop").touch()
    assert [of_rank.state for of_rank in attempt(run_dir, 1)] == ["returned"]
    assert "was left over from an earlier start and is removed" in (run_dir / "logs/worker-0.log").read_text()


def stop(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "disttrain_launch", "stop", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)


def test_the_command_waits_until_the_run_has_stopped(tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", []
    with once(lambda: has_made_a_step(run_dir), lambda: said.append(stop(str(run_dir), "--wait"))):
        words_of_all(attempt(run_dir, 2, overrides=("train.epochs=100000",)))
        deadline = time.monotonic() + 240
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
    (done,) = said
    assert done.returncode == 0, done.stderr
    newest = CheckpointStore(run_dir / "checkpoints").paths()[-1]
    assert done.stdout == f"{run_dir} has stopped; its newest checkpoint is {newest}\n"
    again = stop(str(run_dir))
    assert again.returncode == 2
    assert again.stderr == f"disttrain: nothing is training in {run_dir}: there is nothing to stop.\n"
    assert not (run_dir / "stop").exists()


def test_what_is_no_run_is_not_stopped(tmp_path: Path) -> None:
    done = stop(str(tmp_path))
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    assert not list(tmp_path.iterdir())
