"""A rank that stands still is named, wherever it stands; one that is only slow is left alone."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from disttrain.distributed import exact_sum
from disttrain.distributed.collectives import num_issued
from disttrain.health import finite, watchdog
from disttrain.health.progress import Progress
from disttrain.health.stacks import waits_for_others
from disttrain.recipe import load_recipe
from disttrain.testing import WorkerFailed, cluster, faults, hosts, workers
from disttrain.testing.faults import Fault
from disttrain.training.job import Job
from tests.disttrain.parallel.exact_runs import build, train

HANG_TIMEOUT_S = 2.0
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


def job(run_dir: Path, *overrides: str, model: nn.Module | None = None) -> None:
    model = model or build(3, (3, 32, 32))
    train(run_dir, f"train.hang_timeout_s={HANG_TIMEOUT_S}", "train.epochs=1000", *overrides, model=model)


class HoldsTheInterpreter(nn.Module):
    """One worker's forward pass never comes back from C, and no other thread of it can run Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build(3, (3, 32, 32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if os.environ["RANK"] == "1" and Path("stuck-now").exists():
            ctypes.PyDLL(None).sleep(600)
        return self.inner(images)


class SleepsBetweenBlocks(nn.Module):
    """One worker's backward pass stands still where the other goes on to gather the next block's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)))
        self.second = nn.Sequential(nn.Sequential(nn.Linear(8, 3)))
        self.num_passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(images)
        if hidden.requires_grad:
            self.num_passes += 1
            if os.environ["RANK"] == "1" and self.num_passes == 20:
                hidden.register_hook(lambda _: time.sleep(600))
        return self.second(hidden)  # type: ignore[no-any-return]


def verdicts(
    run_dir: Path, world_size: int, *injuries: Fault, model: nn.Module | None = None, overrides: tuple[str, ...] = ()
) -> list[str]:
    """Train until the watchdog ends it; what each rank's log has of its verdict."""
    with (
        workers(world_size, faults=injuries, process_group=False, check_collectives=False, timeout_s=480) as group,
        suppress(WorkerFailed),
    ):
        group.run(job, run_dir, *overrides, model=model)
    logs = [(run_dir / "logs" / f"worker-{rank}.log").read_text() for rank in range(world_size)]
    return [next((line for line in log.splitlines() if "no worker has made progress" in line), "") for log in logs]


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path, stopped: int) -> None:
    """Rank 0 serves the store: once it is stopped, nothing more can be learned from there."""
    of_rank = verdicts(tmp_path / "run", 2, faults.stop(stopped, step=5))
    said = of_rank[1 - stopped]
    assert said.startswith(
        f"no worker has made progress for {HANG_TIMEOUT_S:g} s (train.hang_timeout_s): rank {stopped} "
    )
    assert f"on {socket.gethostname()} (process " in said
    assert "has not been heard from for" in said
    assert f"Rank {1 - stopped} waits for it at step 5, computing the next step (" in said
    assert of_rank[stopped] == ""


def test_a_rank_that_sleeps_in_python_is_named_with_the_line_it_is_in(tmp_path: Path) -> None:
    of_rank = verdicts(tmp_path / "run", 3, faults.slow(1, 600, step=4))
    for said in filter(None, of_rank):
        assert "rank 1 on " in said
        assert "is stuck at step 4, computing the next step (" in said
        assert "faultpoints.py:" in said
        assert said.endswith("the other ranks wait for it. The stacks of all are in the run's logs/worker-RANK.log.")
    assert any(of_rank)
    log = (tmp_path / "run/logs/worker-0.log").read_text()
    assert "Current thread" in log, "no stacks"


def test_a_rank_that_stands_still_between_two_blocks_of_a_sharded_model_is_named(tmp_path: Path) -> None:
    model, sharded = SleepsBetweenBlocks(), ("parallel.strategy=fsdp", "parallel.shard_modules=['Sequential']")
    of_rank = list(filter(None, verdicts(tmp_path / "run", 2, model=model, overrides=sharded)))
    assert of_rank
    for said in of_rank:
        assert "rank 1 on " in said
        assert "rank 0 on " not in said
        assert "test_watchdog.py:" in said
        assert "; the other ranks wait for it." in said


@pytest.mark.distributed(world_size=2, check_collectives=False)
def test_collectives_begun_are_counted_on_each_rank(rank: int) -> None:
    before = num_issued(torch.device("cpu"))
    work = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(3 if rank == 0 else 1)]
    assert num_issued(torch.device("cpu")) - before == len(work), "of those that never end, too"
    work += [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(0 if rank == 0 else 2)]
    assert all(one.wait() for one in work)


def beat(rank: int, *, place: int = 7, issued: int, waits: bool) -> watchdog.Beat:
    return watchdog.Beat(rank, "box", 100 + rank, 1, "computing the next step", 3, place, issued, False, 9.0, waits, ())


def test_who_has_begun_fewer_collectives_holds_up_the_others() -> None:
    """Wherever they wait: on a GPU that is any line that wants a number of it."""
    beats = [beat(0, issued=12, waits=False), beat(1, issued=10, waits=True), beat(2, issued=12, waits=False)]

    def named(beats: list[watchdog.Beat]) -> set[int]:
        said, culprits = watchdog._account({one.rank: one for one in beats}, [], {}, beats[0])
        assert {rank for rank in range(3) if f"rank {rank} on box" in said} == set(culprits)
        return set(culprits)

    assert named(beats) == {1}
    assert named([beat(rank, issued=12, waits=rank != 1) for rank in range(3)]) == {1}, "where none is behind"
    assert named([beat(0, place=8, issued=12, waits=False), beat(1, issued=12, waits=True), beats[2]]) == {1, 2}


@pytest.mark.parametrize("look", ["all_finite", "QuickCheck", "exact_sum_"])
def test_a_rank_that_looks_at_a_number_of_its_gpu_waits_for_the_others(
    look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the GPU was given before comes first, other ranks' sums among it."""
    seen: list[bool] = []

    def looked(number: torch.Tensor) -> Any:
        seen.append(waits_for_others(sys._getframe(1)))
        return [1, 0, 0] if number.numel() > 1 else False

    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    check = finite.QuickCheck.of([weight])
    assert check is not None
    looks: dict[str, Callable[[], bool | None]] = {
        "all_finite": lambda: finite.all_finite([torch.ones(1)]),
        "QuickCheck": check.all_finite,
        "exact_sum_": lambda: exact_sum.holds(torch.ones(3)),
    }
    for name in ("item", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, looked)
    assert looks[look]()
    assert seen == [True]


def test_where_a_rank_was_stuck_is_logged_also_if_the_others_continue_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher kills it then, and nothing else would show it."""
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)  # it ends the process
    world: Any = SimpleNamespace(rank=0, size=1, host="box", device=torch.device("cpu"), sums=None)
    ended: list[str] = []
    asked: list[list[int]] = []
    progress = Progress()
    progress.at("computing the next step", 3)
    dog = watchdog.Watchdog(world, progress, 0.2, tmp_path / "log", ended.append)
    dog.cure = lambda ranks: asked.append([*ranks]) is None
    with open(tmp_path / "log", "ab", buffering=0) as dog._stacks:
        judging = threading.Thread(target=dog._judge)
        judging.start()
        deadline = time.monotonic() + 60
        while len(asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        dog._closed.set()
        judging.join()
    log = (tmp_path / "log").read_text()
    assert log.count("no worker has made progress for 0.2 s (train.hang_timeout_s): rank 0 on box") == 1
    assert log.count("Current thread") == 1
    assert asked[0] == [0]
    assert not ended


def test_compiling_may_take_as_long_as_it_takes() -> None:
    """The first time for each size of a batch, until it has made progress."""
    job: Any = SimpleNamespace(recipe=load_recipe("digits", ["train.compile=true"]), compiled=set())
    stages = [("training", [64]), ("training", [64, 64]), ("training", [30]), ("evaluating", [64]), ("training", [30])]
    assert [Job.compiles_in(job, *stage) for stage in stages] == [True, False, True, True, False]
    progress = Progress()
    progress.at("evaluating", 3, patient=True)
    progress.tick()
    assert not progress.patient
    job.recipe = load_recipe("digits")
    assert not Job.compiles_in(job, "training", [1])


def test_a_rank_that_holds_the_interpreter_in_c_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def stick() -> None:
        while (
            not (tmp_path / "run/journal.jsonl").exists()
            or "train/loss" not in (tmp_path / "run/journal.jsonl").read_text()
        ):
            time.sleep(0.02)
        (tmp_path / "stuck-now").touch()

    threading.Thread(target=stick, daemon=True).start()
    said, _ = verdicts(tmp_path / "run", 2, model=HoldsTheInterpreter())
    assert "rank 1 on " in said
    assert "has not been heard from for" in said
    assert "stuck in C code" in said


@pytest.mark.long
def test_a_rank_that_is_only_slow_is_left_alone(tmp_path: Path) -> None:
    """Its evaluation takes longer than the timeout, while the other waits in a collective for it."""
    slowed = faults.slow(1, HANG_TIMEOUT_S / 4, at="evaluation", times=8)
    overrides = ("train.max_steps=2", "train.eval_batch_size=2")
    with workers(2, faults=[slowed], process_group=False, check_collectives=False, timeout_s=480) as group:
        group.run(job, tmp_path / "run", *overrides)
    assert len(slowed.happened) == 8


@needs_hosts
@pytest.mark.long
def test_a_machine_that_is_cut_off_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with cluster(2) as machines:

        def cut() -> None:
            journal = run_dir / "journal.jsonl"
            while not journal.exists() or journal.read_text().count("train/loss") < 3:
                time.sleep(0.02)
            machines[1].cut()

        threading.Thread(target=cut, daemon=True).start()
        with (
            workers(2, hosts=machines, process_group=False, check_collectives=False, timeout_s=480) as group,
            suppress(WorkerFailed),
        ):
            group.run(job, run_dir)
    said = (run_dir / "logs/worker-0.log").read_text()
    assert "no worker has made progress" in said
    assert "rank 1 on host-1 (process " in said
    assert "has not been heard from for" in said
