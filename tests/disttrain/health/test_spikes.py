"""The spike guard: a batch that throws the loss up is left out, as if it had never been, whatever happens around it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import disttrain
from disttrain import rng
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.errors import ConfigurationError, DivergedError
from disttrain.health.spikes import SpikeGuard, read_skipped, write_skipped
from disttrain.recipe import load_recipe, parse_recipe
from disttrain.runs.journal import read_journal
from disttrain.testing import faults, workers
from disttrain.testing.faults import Fault
from disttrain.testing.group import Outcome as Ended
from tests.disttrain.parallel.exact_runs import SMALL

NUM_SAMPLES, BATCH = 320, 16
POISONED = 12  # the step, counted from 0, whose batch is absurd
GUARD = ("train.spike_factor=4", "train.spike_window=8", "checkpoint.every_steps=5")


def job(run_dir: Path, *overrides: str, poisoned: tuple[int, ...] = (POISONED,), hooks: Any = ()) -> None:
    """One epoch, so that each sample is met once."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_SAMPLES, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)
    order = rng.permutation(0, 0, NUM_SAMPLES)
    for step in poisoned:
        images[order[step * BATCH : (step + 1) * BATCH]] *= 300
    small = [*SMALL, "model.name=net", "train.epochs=1", *GUARD, *overrides]
    train_set, test_set = (images, labels), (images[:31].clamp(-3, 3), labels[:31])
    recipe = load_recipe("digits", small)
    disttrain.train(recipe, run_dir=run_dir, train_set=train_set, test_set=test_set, hooks=hooks)


def attempt(
    run_dir: Path, size: int, *overrides: str, injuries: tuple[Fault, ...] = (), **options: object
) -> list[Ended]:
    with workers(size, faults=injuries, process_group=False, check_collectives=False, timeout_s=480) as group:
        return group.attempt(job, run_dir, *overrides, **options)


def bits(run_dir: Path) -> tuple[str, str]:
    """Hashes of the weights and of the optimizer's state in the end."""
    checkpoint = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])
    assert checkpoint.state["finished"]
    return weights_sha256(checkpoint.model), weights_sha256(checkpoint.optimizer)


def spikes(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_journal(run_dir / "journal.jsonl") if record.get("name") == "spike"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("guarded") / "run"
    (ended,) = attempt(run_dir, 1)
    assert ended.state == "returned", ended.text
    return run_dir


def test_the_run_goes_back_and_on_without_the_batch(guarded: Path, tmp_path: Path) -> None:
    """The same weights as those of a run that was told beforehand to leave the step out."""
    assert spikes(guarded) == [POISONED + 1]
    assert json.loads((guarded / "spikes.json").read_text()) == {"skipped_steps": [POISONED]}
    log = (guarded / "logs/worker-0.log").read_text()
    assert f"the loss of step {POISONED + 1} is " in log
    assert "returning to the newest checkpoint, and continuing without that step" in log
    told = tmp_path / "told"
    attempt(told, 1, injuries=(faults.terminate(0, step=2),))
    write_skipped(told, frozenset({POISONED}))
    assert [ended.state for ended in attempt(told, 1)] == ["returned"]
    assert spikes(told) == []
    assert bits(told) == bits(guarded)


def test_without_the_guard_the_batch_is_learned_from(guarded: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert [ended.state for ended in attempt(run_dir, 1, "train.spike_factor=0")] == ["returned"]
    assert not (run_dir / "spikes.json").exists()
    assert spikes(run_dir) == []
    assert bits(run_dir) != bits(guarded)


@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (3, "fsdp")])
def test_every_number_of_workers_gives_the_same_bits(guarded: Path, tmp_path: Path, size: int, strategy: str) -> None:
    run_dir = tmp_path / "run"
    ended = attempt(run_dir, size, f"parallel.strategy={strategy}")
    assert [one.state for one in ended] == ["returned"] * size, ended[0].text
    assert spikes(run_dir) == [POISONED + 1]
    assert bits(run_dir) == bits(guarded)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_kill_after_going_back_changes_nothing(guarded: Path, tmp_path: Path, forgets: bool) -> None:
    """Not even if the steps to leave out are forgotten: the same losses lead to the same decision."""
    run_dir = tmp_path / "run"
    # Steps 0 to 12, back to the checkpoint of step 10, and 10 once more: the 15th time at the point is step 11 again.
    (ended,) = attempt(run_dir, 1, injuries=(faults.kill(0, at="step", count=15),))
    assert ended.state == "died"
    assert read_skipped(run_dir) == {POISONED}
    if forgets:
        (run_dir / "spikes.json").unlink()
    assert [ended.state for ended in attempt(run_dir, 2)] == ["returned"] * 2
    assert bits(run_dir) == bits(guarded)


class Sees(disttrain.Hook):
    """It has no state, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def after_step(self, context: disttrain.HookContext) -> None:
        self.seen.append(context.step)


class Remembers(Sees):
    def state(self) -> Any:
        return self.seen

    def load_state(self, state: Any) -> None:
        self.seen = state


def test_a_hooks_state_goes_back_with_the_run_and_what_has_none_stays(tmp_path: Path) -> None:
    remembers, sees = Remembers(), Sees()
    job(tmp_path / "run", hooks=[remembers, sees])
    assert remembers.seen == list(range(1, 21))
    assert sees.seen == [*range(1, POISONED + 1), *range(11, 21)]


def test_too_many_spikes_end_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for ended in attempt(run_dir, 2, "train.spike_limit=1", poisoned=(POISONED, POISONED + 3)):
        assert isinstance(ended.error, DivergedError), ended.text
        assert "1 steps have been left out already (train.spike_limit)" in str(ended.error)
    assert read_skipped(run_dir) == {POISONED}


def test_what_is_a_spike() -> None:
    guard = SpikeGuard(parse_recipe({"train": {"spike_factor": 3.0, "spike_window": 4}}).train)
    assert guard.is_on
    assert guard.normal_loss(100.0) is None  # nothing is known yet
    assert guard.normal_loss(1.0) is None
    assert guard.normal_loss(math.nan) is None
    assert guard.normal_loss(1.0) is None
    assert guard.normal_loss(3.0) is None  # of 100, 1, 1: three times the median is not above it
    assert guard.normal_loss(6.1) == 2.0  # of 100, 1, 1, 3
    assert guard.recent == [100.0, 1.0, 1.0, 3.0]
    guard.recent = [-2.0, -2.0, -2.0]
    assert guard.normal_loss(2.0) is None  # as far above the median as six is above two
    assert guard.normal_loss(2.1) == -2.0
    assert not SpikeGuard(parse_recipe({}).train).is_on


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "spikes.json").write_text('{"skipped_steps": ["a"]}')
    with pytest.raises(ConfigurationError, match=r"spikes\.json cannot be read"):
        read_skipped(tmp_path)
