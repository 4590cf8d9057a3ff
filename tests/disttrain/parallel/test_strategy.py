"""However the workers share a batch, the gradient is the mean over its samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from disttrain.data import Loader, MemorySplit, StepSampler
from disttrain.distributed.world import World, join_world
from disttrain.errors import ConfigurationError
from disttrain.parallel.choose import choose_strategy, parallelize
from disttrain.parallel.ddp import Ddp
from disttrain.parallel.sync_batchnorm import convert_sync_batchnorm
from disttrain.recipe import DataRecipe, ParallelRecipe
from disttrain.testing import run_workers

NUM_SAMPLES, BATCH = 22, 8  # the last batch has 6 samples: uneven for 4 workers


def split() -> MemorySplit:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (NUM_SAMPLES, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator)
    return MemorySplit(images, labels, ("a", "b", "c"), (0.5,), (0.5,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def classify(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels, reduction="sum")


def total(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = model(images).sum()
    return answer


def gradients_of_an_epoch(accumulate: int = 1) -> list[list[torch.Tensor]]:
    """The gradients of each step of one epoch, as this worker sees them."""
    with join_world("cpu", threads=1) as world:
        strategy = parallelize(network(), world, ParallelRecipe())
        sampler = StepSampler(NUM_SAMPLES, num_replicas=world.size, rank=world.rank, seed=3, batch_size=BATCH)
        loader = Loader(split(), sampler, DataRecipe(batch_size=BATCH), accumulate=accumulate, device=world.device)
        steps = []
        for batch in loader.epoch(0):
            for number, part in enumerate(batch.parts, start=1):
                loss = strategy.loss(
                    classify,
                    (part.images.double(), part.labels),
                    num_samples=len(part.samples),
                    is_last=number == len(batch.parts),
                )
                (loss / batch.global_size * part.weight * strategy.loss_scale).backward()
            steps.append([parameter.grad.clone() for parameter in strategy.model.parameters()])  # type: ignore[union-attr]
            strategy.model.zero_grad()
        return steps


def reference() -> list[list[torch.Tensor]]:
    """The same, by hand, without any of the machinery: the mean over each slice of the epoch's order."""
    model, data = network(), split()
    order = StepSampler(NUM_SAMPLES, seed=3, batch_size=BATCH).order(0)
    steps = []
    for chosen in order.split(BATCH):
        images = ((data.images[chosen].float() / 255 - 0.5) / 0.5).double()
        model.zero_grad()
        functional.cross_entropy(model(images), data.labels[chosen]).backward()
        steps.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    return steps


@pytest.mark.distributed(world_size=[1, 2, 3, 4], process_group=False)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_the_mean_over_the_global_batch(accumulate: int) -> None:
    steps, expected = gradients_of_an_epoch(accumulate), reference()
    assert len(steps) == len(expected) == 3
    for step, expected_step in zip(steps, expected, strict=True):
        for gradient, expected_gradient in zip(step, expected_step, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


def test_more_workers_than_samples() -> None:
    """A worker without a sample takes part, and weighs nothing."""

    def gradient_of_one_sample() -> torch.Tensor:
        with join_world("cpu", threads=1) as world:
            data = split()
            one = MemorySplit(data.images[:1], data.labels[:1], data.classes, data.mean, data.std)
            strategy = parallelize(network(), world, ParallelRecipe())
            sampler = StepSampler(1, num_replicas=world.size, rank=world.rank, batch_size=4)
            (batch,) = Loader(one, sampler, DataRecipe(batch_size=4), device=world.device).epoch(0)
            (part,) = batch.parts
            loss = strategy.loss(classify, (part.images.double(), part.labels), num_samples=1)
            (loss / batch.global_size * part.weight * strategy.loss_scale).backward()
            gradient = next(strategy.model.parameters()).grad
            assert gradient is not None
            return gradient

    alone, *others = (
        run_workers(gradient_of_one_sample, size, process_group=False, timeout_s=240)[0] for size in (1, 2, 3)
    )
    assert alone.abs().max() > 0
    for other in others:
        torch.testing.assert_close(other, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("wanted", "num_workers", "num_gpus", "chosen"),
    [
        ("auto", 1, 0, "none"),
        ("auto", 1, 1, "none"),
        ("auto", 1, 4, "dp"),
        ("auto", 4, 4, "ddp"),
        ("ddp", 1, 0, "ddp"),
        ("dp", 1, 2, "dp"),
        ("none", 1, 4, "none"),
    ],
)
def test_the_strategy_follows_from_workers_and_gpus(wanted: str, num_workers: int, num_gpus: int, chosen: str) -> None:
    name, reason = choose_strategy(wanted, num_workers, num_gpus)
    assert name == chosen
    assert ("-n gpu" in reason) == (chosen == "dp")


@pytest.mark.parametrize("wanted", ["dp", "none"])
def test_a_strategy_for_one_process_is_refused_for_several(wanted: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parallel.strategy = '{wanted}' is for one process"):
        choose_strategy(wanted, 2, 0)


def test_data_parallel_trains_like_the_model_alone() -> None:
    """What DataParallel does with several GPUs cannot be tried without them; with none it must change nothing."""
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), host="here")
    images = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    results = []
    for name in ("none", "dp"):
        strategy = parallelize(network(), world, ParallelRecipe(strategy=name))  # type: ignore[arg-type]
        strategy.loss(total, images, num_samples=len(images)).backward()
        results.append((next(strategy.model.parameters()).grad, list(strategy.model.state_dict())))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def whole_batch_gradient() -> tuple[nn.Sequential, torch.Tensor]:
    """A network with BatchNorm, and the images that its first backward pass has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    images = torch.rand(9, 1, 5, 5, dtype=torch.float64)
    return model, images


@pytest.mark.distributed(world_size=2, process_group=False)
def test_sync_batchnorm_computes_what_batchnorm_computes_on_the_whole_batch(rank: int, world_size: int) -> None:
    weights = torch.arange(2).view(1, 2, 1, 1)
    alone, images = whole_batch_gradient()
    (alone(images).square() * weights).sum().backward()
    with join_world("cpu", threads=1) as world:
        together = convert_sync_batchnorm(whole_batch_gradient()[0], world.device)
        parallel = nn.parallel.DistributedDataParallel(together)
        (parallel(images.tensor_split(world_size)[rank]).square() * weights).sum().mul(world_size).backward()
    assert list(together.state_dict()) == list(alone.state_dict())
    for (name, ours), theirs in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.distributed(world_size=2, process_group=False)
def test_accumulation_talks_once_per_step() -> None:
    """Gradients travel with the last micro-batch only: DDP's hook runs once per bucket and step."""
    calls = 0

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP wants the types themselves, or none
        nonlocal calls
        calls += 1
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    with join_world("cpu", threads=1) as world:
        strategy = parallelize(network(), world, ParallelRecipe())
        assert isinstance(strategy, Ddp)
        strategy.module.register_comm_hook(None, hook)
        for number in range(4):
            images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
            strategy.loss(total, images, num_samples=2, is_last=number == 3).backward()
    assert calls == 1
