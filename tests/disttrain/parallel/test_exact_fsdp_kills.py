"""Exact mode in shards, killed again and again: the bits of the undisturbed run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.testing import WorkerFailed, faults, workers
from tests.disttrain.parallel.test_exact_fsdp import EXACT, FSDP, TWO_BY_TWO, bits, on, step_of, train_gpt

KINDS = ((2, FSDP), (3, EXACT), (4, TWO_BY_TWO), (1, EXACT), (3, FSDP), (2, EXACT), (4, FSDP))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_25_kills_each_resumed_with_another_strategy_and_number_of_workers(folder: Path) -> None:
    """Of any worker, up to two steps after the newest checkpoint: before, in or after its passes and its commit."""
    keys = ("train.max_steps=20", "train.epochs=20", "checkpoint.every_steps=2")
    train_gpt(folder, "alone", *keys, *EXACT)
    chance = random.Random(12)
    for number in range(25):
        size, kind = KINDS[number % len(KINDS)]
        at = chance.choice(("step", "backward", "before the commit", "after the commit"))
        before = CheckpointStore(folder / "mixed" / "checkpoints").paths()
        begin = read_checkpoint(before[-1]).state["step"] if before else 0
        fault = faults.kill(chance.randrange(size), at=at, step=min(begin + chance.choice((1, 2)), 19))
        with workers(size, faults=[fault], process_group=False) as group, pytest.raises(WorkerFailed):
            group.run(train_gpt, folder, "mixed", *keys, *kind)
        assert fault.happened, (number, at, begin)
    on(2, train_gpt, folder, "mixed", *keys, *FSDP)
    assert bits(folder / "mixed") == bits(folder / "alone")
    assert step_of(folder / "alone") == 20
