"""What the tests of strategies share: a small problem whose batches cannot be shared evenly, solved by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from disttrain.data import MemorySplit, StepSampler
from disttrain.distributed.world import World
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import DataRecipe
from tests.disttrain.data.loaders import train_loader

NUM_SAMPLES, BATCH = 22, 8  # the last batch has 6 samples: uneven for 4 workers

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), host="here")


def split() -> MemorySplit:
    """Images of 4 x 4 in three classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (NUM_SAMPLES, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)
    return MemorySplit(images, labels, ("a", "b", "c"), (0.5,), (0.5,))


def network() -> nn.Module:
    """A network in float64, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def classify(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The sum of the samples' cross-entropies."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels, reduction="sum")


def total(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The sum of all that the model returns."""
    answer: torch.Tensor = model(images).sum()
    return answer


def gradients_of_an_epoch(strategy: Strategy, world: World, accumulate: int = 1) -> list[list[torch.Tensor]]:
    """The gradients of each step of one epoch, as this worker sees them."""
    sampler = StepSampler(NUM_SAMPLES, num_replicas=world.size, rank=world.rank, seed=3, batch_size=BATCH)
    loader = train_loader(split(), sampler, DataRecipe(batch_size=BATCH), accumulate=accumulate, device=world.device)
    steps = []
    for step, batch in enumerate(loader.epoch(0)):
        for part in batch.parts:
            if part.opens_slice:
                strategy.open_slice()
            loss = strategy.loss(
                classify,
                (part.data[0].double(), part.data[1]),
                num_samples=len(part.samples),
                is_last=part.closes_slice,
            )
            (loss / batch.global_size * (not part.is_filler) * strategy.loss_scale).backward()  # type: ignore[no-untyped-call]
            if part.closes_slice:
                strategy.close_slice(part.slice_index)
        strategy.finish_step(batch.global_size, step)
        steps.append([parameter.grad.clone() for parameter in strategy.model.parameters()])  # type: ignore[union-attr]
        strategy.model.zero_grad()
    return steps


def gradients_by_hand() -> list[list[torch.Tensor]]:
    """The same without any of the machinery: the mean over each slice of the epoch's order."""
    model, data = network(), split()
    order = StepSampler(NUM_SAMPLES, seed=3, batch_size=BATCH).order(0)
    steps = []
    for chosen in order.split(BATCH):
        images = ((data.images[chosen].float() / 255 - 0.5) / 0.5).double()
        model.zero_grad()
        functional.cross_entropy(model(images), data.labels[chosen]).backward()
        steps.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    return steps


def assert_close(steps: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    """Whether the gradients are the same, to the rounding of float64."""
    assert len(steps) == len(expected)
    for step, expected_step in zip(steps, expected, strict=True):
        for gradient, expected_gradient in zip(step, expected_step, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
