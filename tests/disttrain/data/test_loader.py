"""Batches, from memory and from a stream."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.data import (
    EvalLoader,
    Loader,
    MemorySplit,
    SampleSet,
    Split,
    StepBatch,
    StepSampler,
    StreamSplit,
    as_split,
    normalise,
)
from disttrain.data.sources.synthetic import synthetic_images
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from disttrain.task import Task
from tests.disttrain.data.loaders import eval_loader, train_loader

AUGMENTED = {"crop_padding": 2, "flip": True, "cutout": 4}


def numbered(length: int) -> MemorySplit:
    """Image k is all k, and so is its label."""
    names = tuple(map(str, range(max(2, length))))
    labels = torch.arange(length)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    return MemorySplit(images, labels, names, (0.0,), (1 / 255,))


def epoch(
    split: Split, size: int, rank: int, *, batch_size: int = 16, accumulate: int = 1, start: int = 0, **keys: Any
) -> Iterator[StepBatch]:
    sampler = StepSampler(len(split), num_replicas=size, rank=rank, seed=5, batch_size=batch_size)
    loader = train_loader(split, sampler, DataRecipe(**keys), accumulate=accumulate, seed=5)
    return loader.epoch(2, start)


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_every_sample_once_an_epoch_with_weights_that_count_it_once(
    length: int, batch_size: int, size: int, accumulate: int
) -> None:
    split = numbered(length)
    seen: list[int] = []
    for steps in zip(
        *(epoch(split, size, rank, batch_size=batch_size, accumulate=accumulate) for rank in range(size)), strict=True
    ):
        assert all(len(step.parts) == accumulate for step in steps)
        mine = [part for step in steps for part in step.parts]
        assert sum(part.weight for part in mine) == steps[0].global_size == steps[0].global_weight
        for part in mine:
            images, labels = part.data
            assert (part.weight, len(labels)) == (0, 1) if part.is_filler else part.weight == len(labels)
            assert torch.equal(images[:, 0, 0, 0].round().long(), labels)
        seen += [label for part in mine if part.weight for label in part.data[1].tolist()]
    assert sorted(seen) == list(range(length))


def whole(split: Split, size: int, **keys: Any) -> dict[int, torch.Tensor]:
    """Each sample's image as training saw it, by its place in the epoch."""
    shares = [[part for step in epoch(split, size, rank, **keys) for part in step.parts] for rank in range(size)]
    order: dict[int, torch.Tensor] = {}
    sampler = StepSampler(len(split), seed=5, batch_size=16)
    workers = [StepSampler(len(split), num_replicas=size, rank=rank, seed=5, batch_size=16) for rank in range(size)]
    for worker, parts in zip(workers, shares, strict=True):
        worker.set_epoch(2)
        images = torch.cat([part.data[0] for part in parts if part.weight])
        order |= dict(zip(list(worker), images, strict=True))
    assert sorted(order) == list(range(sampler.length))
    return order


def test_a_samples_augmentation_is_the_same_at_every_world_size_and_in_every_part() -> None:
    split = synthetic_images(num_train=50, num_test=1, image_size=8).train
    alone = whole(split, 1, **AUGMENTED)
    assert not torch.equal(alone[0], whole(split, 1)[0]) or not torch.equal(alone[1], whole(split, 1)[1])
    for size, accumulate in ((3, 1), (1, 4), (2, 3)):
        shared = whole(split, size, accumulate=accumulate, **AUGMENTED)
        assert all(torch.equal(alone[sample], shared[sample]) for sample in alone)


def test_turning_on_one_augmentation_leaves_the_others_alone() -> None:
    split = synthetic_images(num_train=50, num_test=1, image_size=8).train
    flipped, both = whole(split, 1, flip=True), whole(split, 1, flip=True, cutout=3)
    for sample, image in both.items():
        assert torch.equal(image[image != 0], flipped[sample][image != 0])


def test_an_epoch_goes_on_from_any_step_with_the_same_bits() -> None:
    split = synthetic_images(num_train=50, num_test=1, image_size=8).train
    undisturbed = list(epoch(split, 2, 1, **AUGMENTED))
    resumed = list(epoch(split, 2, 1, start=2, **AUGMENTED))
    assert [step.step_in_epoch for step in resumed] == [2, 3]
    for before, after in zip(undisturbed[2:], resumed, strict=True):
        assert torch.equal(before.parts[0].data[0], after.parts[0].data[0])
        assert torch.equal(before.parts[0].data[1], after.parts[0].data[1])


class Counted(Task):
    """It weighs batches itself, so that their weights travel a step ahead."""

    def weight(self, batch: torch.Tensor) -> int:
        return len(batch)


@pytest.mark.parametrize("weighs", [False, True])
def test_nothing_is_read_beyond_the_last_step(weighs: bool) -> None:
    """A run may end within an epoch; the sample after it may be one that cannot be read."""
    read: list[int] = []

    class Noting(list[int]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    sampler = StepSampler(20, batch_size=4)
    loader = Loader(SampleSet(Noting(range(20))), sampler, DataRecipe(batch_size=4), Counted(), weighs=weighs)
    assert [batch.step_in_epoch for batch in loader.epoch(0, 1, 3)] == [1, 2]
    assert read == sampler.order(0)[4:12].tolist()
    assert [batch.global_weight for batch in loader.epoch(0, 3, 99)] == [4, 4]


def test_a_batch_is_what_a_hand_written_loop_makes() -> None:
    split = synthetic_images(num_train=64, num_test=1).train
    sampler = StepSampler(64, seed=5, batch_size=16)
    for step in epoch(split, 1, 0):
        indices = sampler.order(2)[step.step_in_epoch * 16 :][:16]
        assert torch.equal(step.parts[0].data[0], normalise(split.images[indices], split.mean, split.std))
        assert torch.equal(step.parts[0].data[1], split.labels[indices])


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 5))
def test_evaluation_batches_do_not_depend_on_the_world_size(length: int, batch_size: int, size: int) -> None:
    split, data = numbered(length), DataRecipe(crop_padding=1, flip=True, cutout=1)
    loaders = [eval_loader(split, data, batch_size=batch_size, rank=rank, size=size) for rank in range(size)]
    dealt = [[(batch.number, batch.data[1].tolist()) for batch in loader] for loader in loaders]
    assert len({len(mine) for mine in dealt}) == 1, "all workers make as many forward passes"
    num_batches = loaders[0].num_batches
    batches = sorted((batch for mine in dealt for batch in mine if batch[0] < num_batches), key=lambda pair: pair[0])
    assert [k for k, _ in batches] == list(range(num_batches))
    assert [label for _, labels in batches for label in labels] == list(range(length))
    assert all(len(labels) == batch_size for _, labels in batches[:-1])


class Noisy:
    """A user's data set whose transform draws from all three global generators, and records nothing."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import random

        import numpy as np

        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return noise.expand(1, 2, 2) + index, index % 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_batches_of_memory_epoch_after_epoch(workers: int) -> None:
    held = synthetic_images(num_train=50, num_test=1, image_size=8).train
    pairs = list(zip(held.images, held.labels.tolist(), strict=True))
    stream = StreamSplit(pairs, held.classes, held.mean, held.std)
    sampler = StepSampler(50, num_replicas=2, rank=1, seed=5, batch_size=16)
    from_memory, from_stream = (
        train_loader(split, sampler, DataRecipe(workers=workers, **AUGMENTED), accumulate=2, seed=5)
        for split in (held, stream)
    )
    next(from_stream.epoch(0))  # given up after a step
    for number, start in ((0, 2), (1, 0)):
        for before, after in zip(from_memory.epoch(number, start), from_stream.epoch(number, start), strict=True):
            assert (before.step_in_epoch, before.global_size) == (after.step_in_epoch, after.global_size)
            for one, other in zip(before.parts, after.parts, strict=True):
                assert torch.equal(one.data[0], other.data[0])
                assert torch.equal(one.data[1], other.data[1])
                assert one.weight == other.weight


def test_a_users_random_transforms_depend_on_epoch_and_sample_alone() -> None:
    split = as_split(Noisy(), DataRecipe())
    before = torch.get_rng_state()
    alone = whole(split, 1, workers=0)
    assert torch.equal(torch.get_rng_state(), before)
    shared = whole(split, 2, workers=1)
    assert all(torch.equal(alone[sample], shared[sample]) for sample in alone)
    assert len({float(image[0, 0, 0]) - sample for sample, image in alone.items()}) > 15


class Uneven(Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 2, 2 + (index == 7), dtype=torch.uint8), index % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_does_not_fit_is_named_without_a_traceback(workers: int) -> None:
    split = as_split(Uneven(), DataRecipe())
    with pytest.raises(ConfigurationError) as caught:
        list(epoch(split, 1, 0, workers=workers))
    assert str(caught.value) == (
        "sample 7 is (1, 2, 3) (channels, height, width) and the first sample (1, 2, 2); bring all to one size."
    )


def test_a_sample_that_does_not_fit_is_named_with_its_set() -> None:
    split = as_split(Uneven(), DataRecipe(), name="the training set of data.dataset = 'mine:sets'")
    with pytest.raises(ConfigurationError, match=r"^sample 7 of the training set of data.dataset = 'mine:sets' is \(1"):
        list(epoch(split, 1, 0, workers=0))


class Signalled(Noisy):
    """Sends its own worker what a scheduler sends to every process of a job."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if os.getpid() != self.parent:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return torch.zeros(1, 2, 2), 0


def test_readers_outlive_a_stop_request_so_that_the_step_can_end() -> None:
    split = as_split(Signalled(os.getpid()), DataRecipe())
    assert sum(len(step.parts[0].data[1]) for step in epoch(split, 1, 0, workers=1)) == 20


class Unsent(Task):
    """Its batches cannot leave the process that reads them."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self.make = make

    def collate(self, samples: list[Any]) -> Any:
        return {"values": [self.make(torch.stack(samples))]}


@pytest.mark.timeout(60)
def test_what_a_reader_cannot_send_is_said_and_not_waited_for() -> None:
    split, data = SampleSet([torch.zeros(2)] * 4), DataRecipe(workers=1, layout="stream")
    for make, words in (
        (lambda values: (value for value in values), "cannot be sent from the process that reads data: TypeError: "),
        (lambda values: values.requires_grad_() * 2, "computes a tensor that has a gradient"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            next(iter(EvalLoader(split, data, Unsent(make), batch_size=2)))
    sent = next(iter(EvalLoader(split, data, Unsent(lambda values: values.numpy()), batch_size=2)))
    assert sent.data["values"][0].shape == (2, 2)


def test_closed_readers_are_gone_and_come_back_when_needed() -> None:
    split, data = as_split(Noisy(), DataRecipe()), DataRecipe(workers=2)
    before = set(multiprocessing.active_children())
    loader = eval_loader(split, data, batch_size=4)
    values = [torch.cat([batch.data[0] for batch in loader])]
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    values.append(torch.cat([batch.data[0] for batch in loader]))
    loader.close()
    assert torch.equal(*values)


FAILING = """
import torch
from disttrain.data import EvalLoader, as_split
from disttrain.recipe import DataRecipe, Recipe
from disttrain.task import ImageClassification

class Broken:
    classes = ("a", "b")
    def __len__(self):
        return 20
    def __getitem__(self, index):
        if index > 10:
            raise KeyError("a bug of the user's")
        return torch.zeros(1, 2, 2), 0

if __name__ == "__main__":
    split = as_split(Broken(), DataRecipe())
    for batch in EvalLoader(split, DataRecipe(workers=2), ImageClassification(split, Recipe()), batch_size=2):
        pass
"""


def test_a_failure_ends_the_process_at_once_and_its_readers_with_it(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 1
    assert 'KeyError: "a bug of the user\'s"' in ended.stderr
