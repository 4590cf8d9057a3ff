"""Values that are not finite, seen a step later as on a GPU: the same steps are left out, and the same is said of them.

A CPU passes for a GPU here: torch's fused optimizers leave out steps by the same flag on both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.distributed import later
from disttrain.health import nonfinite_later
from disttrain.runs.journal import read_journal
from disttrain.testing import run_workers
from tests.disttrain.health.test_nonfinite import VICTIM, ending, events, job, samples_of, scaled_by

COMMON = ("checkpoint.every_steps=0", "optim.fused=true", "train.epochs=2")
NUM_STEPS = 8


def as_on_a_gpu(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """What it returns, and how many steps were left to be looked at later."""
    num, check = 0, nonfinite_later.LateNonFiniteGuard.check

    def counted(self: Any, *args: Any) -> Any:
        nonlocal num
        verdict = check(self, *args)
        num += self.is_bad() is not None
        return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(later, "is_asynchronous", lambda device: True)
        patch.setattr(nonfinite_later.LateNonFiniteGuard, "check", counted)
        return function(*args), num


def recorded(run_dir: Path) -> list[Any]:
    """The journal without what depends on the time of day, or on when a step was looked at."""
    found = []
    for record in read_journal(run_dir / "journal.jsonl"):
        if record["kind"] == "metrics" and "train/loss" in record["metrics"]:
            metrics = {name: str(value) for name, value in record["metrics"].items() if "per_second" not in name}
            found.append((record["step"], sorted(metrics.items())))
    return found


def state_of_both(folder: Path) -> dict[str, Any]:
    """The newest state of the runs "at once" and "later", which have the same weights, counters and records."""
    runs = folder / "at once", folder / "later"
    one, other = (read_checkpoint(CheckpointStore(run / "checkpoints").paths()[-1]) for run in runs)
    assert weights_sha256(one.model) == weights_sha256(other.model)
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, tensor in one.optimizer.items():
        there = other.optimizer[name]
        assert torch.allclose(tensor, there) if name.startswith("ema.") else tensor.equal(there), name
    for key in ("step", "scaler", "non_finite"):
        assert one.state.get(key) == other.state.get(key), key
    assert recorded(runs[0]) == recorded(runs[1])
    return one.state


def on(num_workers: int, function: Callable[..., Any], *args: Any) -> Any:
    """What the first of so many workers returns; one is this process."""
    return function(*args) if num_workers == 1 else run_workers(function, 2, args=args, process_group=False)[0]


@pytest.mark.parametrize(
    ("num_workers", "options"), [(2, ("optim.momentum=0.9",)), (1, ("optim.name=adamw", "optim.lr=0.01"))]
)
def test_the_same_steps_are_left_out(tmp_path: Path, num_workers: int, options: tuple[str, ...]) -> None:
    """At a run's and an epoch's start and end, too, and with averages, which are of no step that was left out."""
    bad = [samples_of(0)[0], samples_of(7)[0]]
    settings = (*options, *COMMON, "train.non_finite=skip", "train.clip_norm=1.0", "train.ema_decay=0.9")
    on(num_workers, job, tmp_path / "at once", bad, *settings)
    _, num_later = on(num_workers, as_on_a_gpu, job, tmp_path / "later", bad, *settings)
    assert num_later == NUM_STEPS, "no step was waited for"
    assert state_of_both(tmp_path)["non_finite"]["total"] >= 3
    facts = [[{key: event[key] for key in ("step", "epoch", "policy", "rank", "samples", "in_a_row", "total")}
              for event in events(tmp_path / run, "non-finite")] for run in ("at once", "later")]  # fmt: skip
    assert facts[0] == facts[1]


def without_leaving_out(function: Callable[..., Any], *args: Any) -> Any:
    """By the kernels of a GPU, with a look at each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonfinite_later, "_can_leave_out", lambda *_: False)
        found, num_later = as_on_a_gpu(function, *args)
    assert num_later == 0
    return found


@pytest.mark.parametrize("other", ["sgd", "adamw"])
def test_muon_leaves_out_the_same_steps_on_the_device(tmp_path: Path, other: str) -> None:
    """The first step too, and the last: matrices, and what its other optimizer trains, with their momenta."""
    bad = [samples_of(0)[0], samples_of(2)[0], samples_of(7)[0]]
    settings = (
        "optim.name=muon", f"optim.other={other}", "optim.lr=0.01", "optim.momentum=0.9", "optim.hold_norms=true",
        "checkpoint.every_steps=0", "train.epochs=2", "train.non_finite=skip",
    )  # fmt: skip
    without_leaving_out(job, tmp_path / "at once", bad, *settings)
    _, num_later = as_on_a_gpu(job, tmp_path / "later", bad, *settings)
    assert num_later == NUM_STEPS, "no step was waited for"
    assert state_of_both(tmp_path)["non_finite"]["total"] >= 3


@pytest.mark.parametrize(
    ("num_workers", "victim"), [(1, VICTIM), (2, samples_of(3)[0])], ids=["seen in the next step", "at the epoch's end"]
)
def test_the_run_ends_where_the_step_was_left_out(tmp_path: Path, num_workers: int, victim: int) -> None:
    found = []
    for run in ("run", "later"):
        settings = (tmp_path / run, [victim], *COMMON)
        if run == "run":
            message = on(num_workers, ending, *settings)
        else:
            message = on(num_workers, as_on_a_gpu, ending, *settings)[0].replace("/later/", "/run/")
        newest = read_checkpoint(CheckpointStore(tmp_path / run / "checkpoints").paths()[-1])
        (event,) = events(tmp_path / run, "diverged")
        found.append((
            message, newest.state["step"], newest.state["non_finite"], weights_sha256(newest.model),
            weights_sha256(newest.optimizer), event["step"], recorded(tmp_path / run),
        ))  # fmt: skip
    assert found[0] == found[1]


def test_the_limit_counts_steps_that_are_seen_later(tmp_path: Path) -> None:
    settings = (*COMMON, "train.non_finite=skip", "train.non_finite_limit=1")
    bad = [samples_of(1)[0], samples_of(2)[0]]
    at_once = ending(tmp_path / "run", bad, *settings)
    seen_later, _ = as_on_a_gpu(ending, tmp_path / "later", bad, *settings)
    assert seen_later.replace("/later/", "/run/") == at_once
    assert "in 2 steps in a row" in at_once


@pytest.mark.parametrize(
    ("num_workers", "policy", "optimizer"),
    [
        (2, "skip", ("optim.momentum=0.9",)),
        (1, "skip", ("optim.name=muon", "optim.lr=0.01", "optim.other=sgd")),
        (1, "stop", ("optim.name=adamw", "optim.lr=0.01")),
    ],
)
def test_an_overflow_in_fp16_is_told_from_a_bad_loss_on_the_device(
    tmp_path: Path, num_workers: int, policy: str, optimizer: tuple[str, ...]
) -> None:
    """The first steps overflow; of the step after one of them and of a later one the loss is bad, whatever the scale.

    On one of two workers, so that the other has to learn of it before it changes the scale.
    """
    bad, initial = [samples_of(step)[7] for step in (1, 6)], 2.0**22
    settings = (
        *optimizer, "checkpoint.every_steps=0", "train.epochs=2", f"train.non_finite={policy}", "train.ema_decay=0.9"
    )  # fmt: skip
    message = on(num_workers, without_leaving_out, scaled_by, initial, tmp_path / "at once", bad, *settings)
    said_later, num_later = on(num_workers, as_on_a_gpu, scaled_by, initial, tmp_path / "later", bad, *settings)
    assert num_later >= (NUM_STEPS if policy == "skip" else 2), "no step was waited for"
    assert said_later == message.replace("/at once/", "/later/")
    scale = state_of_both(tmp_path)["scaler"]["scale"]
    assert scale < initial, "the test shows nothing: no step has overflowed"
    found = [
        [(one["step"], one["rank"], one["samples"], one["in_a_row"]) for one in events(tmp_path / run, "non-finite")]
        for run in ("at once", "later")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == (3 if policy == "skip" else 0)
