"""One run, killed again and again at all sorts of moments and resumed with other numbers of workers: the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from disttrain.checkpoint import CheckpointStore
from disttrain.testing import WorkerFailed, faults, run_workers, workers
from disttrain.testing.faults import Fault
from tests.disttrain.parallel.exact_runs import SMALL, outcome, train

ROOT = Path(__file__).parents[3]
SIZES = (1, 1, 2, 2, 3, 4)  # small ones more often: each worker costs its start
VICTIMS = ("worker", "launcher", "all")
OVERRIDES = (
    "model.name=tests.disttrain.parallel.exact_runs:build",
    "data.options={num_train=150, num_test=31, num_classes=3}",
    "data.crop_padding=4",
    "data.flip=true",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=1",
)


def job(run_dir: Path, epochs: int) -> None:
    train(run_dir, *OVERRIDES, f"train.epochs={epochs}")


def job_of_a_process(run_dir: Path, epochs: int) -> None:
    """A worker that loses a peer ends, and with it its connections: then no other waits for it."""
    try:
        job(run_dir, epochs)
    except RuntimeError:
        os._exit(1)


def newest_step(run_dir: Path) -> int:
    paths = CheckpointStore(run_dir / "checkpoints").paths()
    return int(paths[-1].name.removeprefix("step-")) if paths else 0


def a_moment(dice: random.Random, size: int, step: int) -> Fault:
    """A SIGKILL to a worker, or to all of them, at a random point or a random time."""
    victim = dice.choice([*range(size), None])
    return dice.choice(
        [
            faults.kill(victim, at="start"),
            faults.kill(victim, step=step + dice.randrange(5)),
            faults.kill(victim, at="evaluation"),
            faults.kill(victim, after_s=dice.uniform(0.01, 0.4)),
            # Only rank 0 writes.
            faults.kill(0, at="checkpoint: tensors"),
            faults.kill(0, at="checkpoint: written"),
            faults.kill(0, at="checkpoint: named"),
            faults.kill(0, at="checkpoint: retired"),
        ]
    )


def killed_by_a_fault(run_dir: Path, epochs: int, dice: random.Random) -> bool:
    """A start of the run in warm workers, with a fault in it. False if the run came to its end."""
    size = dice.choice(SIZES)
    fault = a_moment(dice, size, newest_step(run_dir))
    # Not `group.attempt`: as a launcher does, `run` ends the others when one is dead. They may wait for it for a
    # minute, as they do for the store of a rank 0 that was killed before it had one.
    with suppress(WorkerFailed), workers(size, faults=[fault], process_group=False, check_collectives=False) as group:
        group.run(job_of_a_process, run_dir, epochs)
    return bool(fault.happened)


def killed_from_outside(run_dir: Path, epochs: int, dice: random.Random, victim: str) -> bool:
    """A start by `disttrain train`; the launcher, a worker or all of them are killed. False if the run was quicker."""
    settings = (*SMALL, *OVERRIDES, f"train.epochs={epochs}", "parallel.on_lost_worker=restart")
    overrides = [word for override in settings for word in ("-o", override)]
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", *overrides]
    size = dice.choice(SIZES)
    job = psutil.Popen([*command, "-n", str(size), "--run-dir", str(run_dir)], cwd=ROOT, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip
    began, journal = time.monotonic(), run_dir / "journal.jsonl"
    known, late = journal.stat().st_size if journal.exists() else 0, dice.random() < 0.7
    # In the first second and a half, or some time after the first line of its own in the journal.
    until: Callable[[], bool] = lambda: time.monotonic() - began > 1.5  # noqa: E731
    if late:
        until = lambda: journal.exists() and journal.stat().st_size > known  # noqa: E731
    while not until() and job.poll() is None:
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.3))
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = job.children(recursive=True)
        victims = {"worker": job.children()[:1], "launcher": [job], "all": [job, *family]}
        for process in victims[victim] or [job]:
            process.kill()
    code = job.wait(timeout=240)
    _, alive = psutil.wait_procs(family, timeout=240)
    assert not alive, "a worker has outlived its launcher"
    return bool(code)


def run_with_kills(tmp_path: Path, num_kills: int, num_outside: int, epochs: int, seed: int) -> None:
    """Compare a run that met `num_kills` SIGKILLs, `num_outside` of them from outside, with one that met none."""
    dice = random.Random(seed)
    run_workers(job, 1, args=(tmp_path / "undisturbed", epochs), process_group=False, timeout_s=1200)
    run_dir, kills = tmp_path / "killed", 0
    outside = range(1, num_kills, num_kills // num_outside)
    for attempt in range(2 * num_kills):
        if kills == num_kills:
            break
        if attempt in outside:
            killed = killed_from_outside(run_dir, epochs, dice, VICTIMS[outside.index(attempt) % len(VICTIMS)])
        else:
            killed = killed_by_a_fault(run_dir, epochs, dice)
        kills += killed
        assert killed or newest_step(run_dir) < 10 * epochs, f"the run ended after {kills} kills: it is too short"
    assert kills >= num_kills
    run_workers(job, dice.choice(SIZES), args=(run_dir, epochs), process_group=False, timeout_s=300)
    assert outcome(run_dir) == outcome(tmp_path / "undisturbed")
    assert not list((run_dir / "checkpoints").glob(".*")), "something is left of a save that was killed"


@pytest.mark.timeout(900)
def test_12_kills_leave_no_trace_in_a_single_bit(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 12, num_outside=3, epochs=20, seed=random.randrange(10**6))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_300_kills_leave_no_trace_in_a_single_bit(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 300, num_outside=60, epochs=260, seed=random.randrange(10**6))
