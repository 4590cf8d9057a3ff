"""Workers that are killed while a run goes on: the others continue with the same bits, and replacements join."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.runs.journal import read_journal
from disttrain.testing import faults
from disttrain_launch.local import worker as worker_module
from disttrain_launch.local import workers as workers_module
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.watch import Watch
from tests.disttrain.parallel.exact_runs import SMALL, outcome
from tests.launch.local.forked import NEW, Run

ROOT = Path(__file__).parents[3]
GLOO = "parallel.shared_memory=false"
CONTINUE = "parallel.on_lost_worker=continue"
IN_MANY_PLACES: dict[str, list[tuple[str, int, int, int]]] = {
    "in a step, in the recovery from it, and later": [
        ("step", 1, 3, SIGKILL),
        ("recovery: joined", 2, 1, SIGKILL),
        ("before the commit", 3, 6, SIGKILL),
    ],
    "in the forward pass, after a slice's backward pass, and in the sum": [
        ("forward", 1, 2, SIGKILL),
        ("backward", 2, 4, SIGKILL),
        ("in the sum", 3, 3, SIGKILL),
    ],
    "in an evaluation, and after others have made their step": [
        ("after the commit", 2, 3, SIGKILL),
        ("evaluation", 1, 2, SIGKILL),
        ("recovery: agreed", 3, 2, SIGKILL),
    ],
    "all but rank 0": [("step", rank, 4, SIGKILL) for rank in (1, 2, 3)],
    "while the checkpoint of an epoch is due, and in the last evaluation": [
        ("after the commit", 1, 5, SIGKILL),
        ("evaluation", 2, 3, SIGKILL),
    ],
    "a replacement that joins, and one that has just received the state": [
        ("step", 1, 2, SIGKILL),
        ("recovery: joined", 1 + NEW, 1, SIGKILL),
        ("step", 2, 4, SIGKILL),
        ("recovery: received", 2 + NEW, 1, SIGKILL),
    ],
    "one stands still, and another one dies meanwhile": [
        ("step", 2, 3, SIGSTOP),
        ("step", 1, 3, SIGKILL),
    ],
}
FORKED_TESTS_S = 480
AUDIT = "parallel.audit_every_steps=1"
SAVING = "checkpoint.every_steps=2"


def launch(*runs: Run) -> list[dict[str, Any]]:
    """How each of these runs ended, see forked.py."""
    command = [sys.executable, "-m", "tests.launch.local.forked", json.dumps([asdict(run) for run in runs])]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=FORKED_TESTS_S, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) | {"stderr": ended.stderr} for line in ended.stdout.splitlines()]


def undisturbed(tmp_path: Path, *overrides: str) -> Run:
    """One worker: the same bits, and the least work."""
    return Run(str(tmp_path / "undisturbed"), size=1, overrides=overrides)


def disturbed(tmp_path: Path, signals: Sequence[tuple[str, int, int, int]], *overrides: str, **more: Any) -> Run:
    return Run(str(tmp_path / "disturbed"), signals=signals, overrides=(CONTINUE, *overrides), **more)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(run_dir / "journal.jsonl") if record.get("name") == name]


def lost_ranks(run_dir: Path) -> list[int]:
    return sorted(rank for event in events(run_dir, "worker-lost") for rank in event["lost_ranks"])


def check(tmp_path: Path, ended: Sequence[dict[str, Any]], lost: Sequence[int], name: str = "disturbed") -> None:
    """The run of this name has become what the undisturbed one has, without these."""
    for one in ended:
        assert one["exit_code"] == 0, (one["message"], one["stderr"])
    assert outcome(tmp_path / name) == outcome(tmp_path / "undisturbed")
    assert lost_ranks(tmp_path / name) == sorted(lost)


def test_the_others_continue_with_the_same_bits_and_a_replacement_joins(tmp_path: Path) -> None:
    signals = [("step", 1, 3, SIGKILL), ("recovery: agreed", 2, 1, SIGKILL), ("after the commit", 1 + NEW, 2, SIGKILL)]
    # Rank 0 dies when it writes a checkpoint, and later on who took its place.
    of_rank_0 = [("checkpoint: state", 0, 1, SIGKILL), ("after the commit", 1, 7, SIGKILL)]
    ended = launch(
        undisturbed(tmp_path, SAVING),
        # By default, as nothing is said of it.
        Run(
            str(tmp_path / "disturbed"),
            size=3,
            signals=signals,
            waits_at=[6],
            overrides=("parallel.on_lost_worker=auto",),
        ),
        Run(str(tmp_path / "without rank 0"), size=3, signals=of_rank_0, overrides=(CONTINUE, SAVING, GLOO)),
        Run(  # within its backward pass, when some gradients are on their way and others are to come
            str(tmp_path / "ahead"), size=3, signals=[("in the sum ahead", 2, 1, SIGKILL)], overrides=(CONTINUE, GLOO)
        ),
        # In step 5 rank 0 computes its slice, which is that step's audited one, wrong.
        Run(
            str(tmp_path / "corrupt"), size=3, signals=[("backward", 0, 7, "flip")], overrides=(CONTINUE, SAVING, AUDIT)
        ),
    )
    check(tmp_path, ended, [1, 1, 2])
    for event in events(tmp_path / "disturbed", "worker-joined"):
        assert event["held_seconds"] >= event["sending_seconds"] > 0.0
        assert event["sent_bytes"] > 1000
    assert events(tmp_path / "disturbed", "worker-joined")
    check(tmp_path, ended, [0, 1], "without rank 0")
    check_what_is_written(tmp_path / "without rank 0", tmp_path / "undisturbed")
    check(tmp_path, ended, [2], "ahead")
    check(tmp_path, ended, [0], "corrupt")
    assert [(event["step"], event["ranks"]) for event in events(tmp_path / "corrupt", "corruption")] == [(5, [0])]
    assert not events(tmp_path / "corrupt", "worker-joined")
    assert ended[0]["stderr"].count("done in") == 5, "whoever takes the place of rank 0 speaks to the user"


def test_those_on_several_machines_continue_whichever_worker_of_a_machine_is_lost(tmp_path: Path) -> None:
    """In the sum: first the one that sums with the other machine, then the only one left there, then one of the rest.

    A replacement joins in between, so that both machines have two workers again.
    """
    signals = [
        ("in the sum", 2, 2, SIGKILL),
        ("in the sum", 3, 3, SIGKILL),
        ("in the sum", 1, 5, SIGKILL),
    ]
    ended = launch(undisturbed(tmp_path), disturbed(tmp_path, signals, machines="aabb", waits_at=[4, 8]))
    check(tmp_path, ended, [1, 2, 3])
    assert events(tmp_path / "disturbed", "worker-joined")
    (start,) = events(tmp_path / "disturbed", "start")
    assert start["world"]["gradients"] == "shared memory (2 + 2 workers) and gloo"


def check_what_is_written(run_dir: Path, undisturbed: Path) -> None:
    """Each checkpoint and evaluation is there and reported, once; of those that wrote before, nothing is left."""
    for name in ("checkpoint", "evaluated"):
        assert [event["step"] for event in events(run_dir, name)] == [e["step"] for e in events(undisturbed, name)]
    assert [record["status"] for record in read_journal(run_dir / "journal.jsonl") if "status" in record][-1] == (
        "FINISHED"
    )
    assert weights(run_dir) == weights(undisturbed)
    assert not [path for path in (*run_dir.iterdir(), *(run_dir / "checkpoints").iterdir()) if path.name[0] == "."]


def weights(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Of each checkpoint, the weights and what was measured."""
    found = [read_checkpoint(path) for path in CheckpointStore(run_dir / "checkpoints").paths()]
    return {Path(one.path).name: (weights_sha256(one.model), str(one.state["metrics"])) for one in found}


@pytest.mark.long
@pytest.mark.parametrize("where", IN_MANY_PLACES)
def test_losses_in_many_places(tmp_path: Path, where: str) -> None:
    signals = IN_MANY_PLACES[where]
    ended = launch(undisturbed(tmp_path), disturbed(tmp_path, signals, "train.hang_timeout_s=4"))
    # A replacement has the rank of the one whose place it takes; one that never joined is not counted.
    check(tmp_path, ended, [rank % NEW for _, rank, _, _ in signals])


@pytest.mark.long
def test_all_are_ended_to_be_restarted_where_the_recipe_says_so(tmp_path: Path) -> None:
    overrides = ("parallel.on_lost_worker=restart",)
    default = Run(str(tmp_path / "default"), signals=[("step", 1, 4, SIGKILL)], overrides=overrides)
    (ended,) = launch(default)
    assert ended["exit_code"] != 0
    assert "rank 1 " in ended["message"]
    assert "SIGKILL" in ended["message"]


def test_a_replacement_that_is_killed_is_replaced_and_one_that_fails_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def ended(code: int, message: str) -> Any:
        return SimpleNamespace(
            rank=2, was_killed=code < 0, ending=SimpleNamespace(message=message), has_ended=lambda: True
        )

    fresh = SimpleNamespace(rank=2, has_ended=lambda: False, waits_to_join=lambda: False)
    watch = Watch(WorkerGroup((), 3), [], 0, lambda dead: fresh, 0, max_losses=1)
    watch._coming = [ended(-SIGKILL, "was killed by SIGKILL")]
    assert watch._those_to_join() == []
    assert watch._coming == [fresh]
    watch._coming = [ended(-SIGKILL, "was killed by SIGKILL"), ended(1, "no memory")]
    assert watch._those_to_join() == []
    assert watch._coming == [], "more than max_losses"
    watch = Watch(WorkerGroup((), 3), [], 0, refuse_to_start, 0)
    watch._coming = [ended(-SIGKILL, "was killed by SIGKILL")]
    assert watch._those_to_join() == watch._coming == [], "the run needs no replacement"
    assert capsys.readouterr().err.splitlines() == [
        "disttrain: the replacement for rank 2 was killed by SIGKILL: starting another",
        "disttrain: continuing without a replacement for rank 2: was killed by SIGKILL",
        "disttrain: continuing without a replacement for rank 2: no memory",
        "disttrain: rank 2 cannot be replaced: [Errno 11] Resource temporarily unavailable",
        "disttrain: continuing without a replacement for rank 2: was killed by SIGKILL",
    ]


def test_a_replacement_that_comes_as_the_others_finish_does_not_decide_how_the_run_ends(tmp_path: Path) -> None:
    """It has a place, for which the others have no use any more: they finish, and end after it."""
    once = "train.eval_every_epochs=2"
    late = disturbed(tmp_path, [("step", 1, 9, SIGKILL)], once, "train.hang_timeout_s=30", size=2, too_late=True)
    ended = launch(undisturbed(tmp_path, once), late)
    check(tmp_path, ended, [1])
    assert not events(tmp_path / "disturbed", "worker-joined")
    assert "holds up the others" not in ended[0]["stderr"]


# What stands for workers: three of which one is lost, and a replacement that has a place when the others are through.
PARTS = """
import fcntl, os, signal, sys, time
from pathlib import Path
from disttrain.distributed.report import report_failure, report_finished, report_ready
from disttrain.distributed.verdicts import Verdicts

folder, end = Path(sys.argv[1]), sys.argv[2]
rank, joins = int(os.environ["RANK"]), bool(os.environ["DISTTRAIN_JOINS"])
verdicts, living = Verdicts.of_this_process(), open(folder / "living", "w")

def wait_for(*names):
    while not all((folder / name).exists() for name in names):
        time.sleep(0.002)

if joins:
    fcntl.flock(living, fcntl.LOCK_EX)
    report_ready(is_ready=True, joins=True)
    generation = verdicts.wait(None).generation
    (folder / "has a place").touch()
    wait_for("through")
    if end == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    report_ready(
        is_ready=True, joins=True, generation=generation, failed=end == "fails", hung=[0] if end == "blames" else []
    )
    assert verdicts.wait(None).rank is None
    print("too late", flush=True)
    report_failure("too late", 1, None, time.time())
    sys.exit(1)
report_ready(is_ready=True, can_lead=True)
(folder / f"ready {rank}").touch()
if rank == 2:
    wait_for("ready 0", "ready 1")
    os.kill(os.getpid(), signal.SIGKILL)
report_ready(is_ready=True, can_lead=True, generation=verdicts.wait(None).generation)
wait_for("has a place")
if rank == 0:
    report_ready(is_through=True, generation=1)
    (folder / "through").touch()
    fcntl.flock(living, fcntl.LOCK_EX)
report_finished()
"""


@pytest.mark.parametrize("end", ["fails", "blames", "is killed"])
def test_how_a_newcomer_ends_counts_for_nothing_once_one_of_the_others_is_through(
    tmp_path: Path, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    group = WorkerGroup(("-c", PARTS, str(tmp_path), end), 3, log_dir=tmp_path)
    with (
        workers_module.signals_heard() as signals,
        workers_module._started(group, 0) as (workers, replace),
    ):
        started = [*workers]
        pids = [worker.pid for worker in started]
        outcome = Watch(group, workers, signals, replace, 0).until_the_end()
    assert (outcome.exit_code, outcome.message) == (0, "")
    assert [worker.ending.code for worker in started if worker.ending] == [0, 0, -SIGKILL]
    assert capfd.readouterr().err == ""
    assert end == "is killed" or "too late" in (tmp_path / "worker-2.log").read_text()
    assert not any(psutil.pid_exists(pid) for pid in pids), "one is left, or was not waited for"


def test_what_a_worker_reports_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher looks several times every two seconds; while it is being written, what it said before holds."""
    worker, parsed = object.__new__(worker_module.Worker), Mock(side_effect=worker_module.parsed)
    monkeypatch.setattr(worker_module, "parsed", parsed)
    worker._written, worker._said = b"", {}
    with TemporaryFile() as worker._report:
        for content, ready in ((b'{"ready": true}', True), (b'{"ready": fals', True), (b'{"ready": false}', False)):
            os.pwrite(worker._report.fileno(), content, 0)
            assert [worker.is_ready() for _ in range(3)] == [ready] * 3
    assert parsed.call_count == 3


def test_a_worker_that_cannot_be_started_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", refuse_to_start)
    lifeline, before = os.open(os.devnull, os.O_RDONLY), os.listdir("/dev/fd")
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            worker_module.Worker(WorkerGroup((), 3), 1, 1, lifeline, (1, 2), joins=True)
    assert len(os.listdir("/dev/fd")) == len(before)
    os.close(lifeline)


def refuse_to_start(*_: object, **options: object) -> None:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.mark.long
def test_the_only_worker_left_stands_still_before_its_replacement_has_joined(tmp_path: Path) -> None:
    """It is killed after the time that a step may take; the replacement, which has no state, is not blamed."""
    stops = [("step", 1, 3, SIGKILL), ("recovery: agreed", 0, 1, SIGSTOP)]
    (ended,) = launch(disturbed(tmp_path, stops, "train.hang_timeout_s=4", size=2))
    assert ended["exit_code"] == 1
    assert "rank 0 holds up the others (train.hang_timeout_s): killing it" in ended["stderr"]
    assert "rank 0 on" in ended["message"]


@pytest.mark.long
def test_a_lost_shard_has_no_copy_and_so_all_restart_from_the_checkpoint_by_themselves(tmp_path: Path) -> None:
    run_dir, sharded = tmp_path / "disturbed", (CONTINUE, "parallel.strategy=fsdp", "checkpoint.every_steps=2")
    model = "model.name=tests.disttrain.parallel.exact_runs:build"
    words = [word for one in (*SMALL, model, *sharded) for word in ("-o", one)]
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", "-n", "2", "--max-restarts", "1", *words]
    with faults.armed(faults.kill(1, step=6)) as armed:
        environment = {**os.environ, **armed, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}"}
        run = [*command, "--run-dir", str(run_dir)]
        ended = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=480, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "restart 1 of 1 from the latest checkpoint" in ended.stderr
    assert "a loss needs a restart (--max-restarts): a lost shard has no copy" in ended.stdout
    launch(undisturbed(tmp_path))
    check(tmp_path, [], [])


def test_a_hundred_losses(tmp_path: Path) -> None:
    """Each worker but rank 0 dies again and again, and so do its replacements; a thousand: see test_losing.py."""
    longer = ("train.epochs=30", "train.eval_every_epochs=30", "checkpoint.every_steps=1000")
    lossy = Run(str(tmp_path / "disturbed"), deaths=34, overrides=(CONTINUE, *longer), most_losses=10_000)
    ended = launch(undisturbed(tmp_path, *longer), lossy)
    check(tmp_path, ended, [1, 2, 3] * 34)
