"""Gradients sent in fewer bytes: rounded once each, the same on every rank, with what is not finite still seen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.distributed.collectives import gather_objects
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, DivergedError
from disttrain.parallel.choose import parallelize
from disttrain.recipe import ParallelRecipe, load_recipe
from disttrain.testing import run_workers
from tests.disttrain.parallel import exact_runs
from tests.disttrain.parallel.gradients import ALONE, gradients_by_hand, gradients_of_an_epoch, network, total

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Mixed(nn.Module):
    """Parameters of several types, of which only those wider than what is sent are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.tensor([0.0]))
        self.small = nn.Parameter(torch.tensor([0.0], dtype=torch.bfloat16))
        self.complex = nn.Parameter(torch.tensor([0.0 + 0.0j]))


@pytest.mark.distributed(world_size=2, process_group=False)
@pytest.mark.parametrize("name", DTYPES)
def test_gradients_are_the_means_to_the_type_that_they_are_sent_in(rank: int, name: str) -> None:
    with join_world("cpu", threads=1, most_sharing_memory=9 * (name == "bf16")) as world:
        strategy = parallelize(network(), world, ParallelRecipe(compress=name))  # type: ignore[arg-type]
        assert strategy.reason == f"DistributedDataParallel: 2 workers, gradients sent as {name}"
        found, exact = gradients_of_an_epoch(strategy, world, accumulate=2), gradients_by_hand()
        rounding = torch.finfo(DTYPES[name]).eps
        for step, expected in zip(found, exact, strict=True):
            for mine, whole in zip(step, expected, strict=True):
                torch.testing.assert_close(mine, whole, rtol=rounding, atol=rounding * float(whole.abs().max()))
                assert torch.equal(mine, mine.to(DTYPES[name]).to(mine.dtype)), "it was not sent in that type"
        first, second = gather_objects([gradient.tolist() for step in found for gradient in step])
        assert first == second

        # The sum of 1 + 1/1024 and 3 + 1/1024 is 4 in either type; a complex number is sent as two.
        mixed = Mixed()
        strategy = parallelize(mixed, world, ParallelRecipe(compress=name))  # type: ignore[arg-type]
        factor = 1 + 2 * rank + 1 / 1024

        def loss(model: nn.Module, factor: float) -> torch.Tensor:
            assert isinstance(model, Mixed)
            return (model.wide + model.small.float()).sum() * factor + (model.complex * (factor * 1j)).real.sum()

        (strategy.loss(loss, factor, num_samples=1) * strategy.loss_scale).backward()  # type: ignore[no-untyped-call]
        strategy.finish_step(2, 0)
        assert mixed.wide.grad is not None
        assert mixed.complex.grad is not None
        assert mixed.wide.grad.item() == 4.0
        assert mixed.complex.grad.item() == -4j


@pytest.mark.distributed(world_size=2, process_group=False)
def test_what_is_not_finite_on_one_worker_is_not_finite_on_all(rank: int) -> None:
    with join_world("cpu", threads=1) as world:
        strategy = parallelize(network(), world, ParallelRecipe(compress="fp16"))
        for step, bad in enumerate((math.nan, math.inf)):
            images = torch.full((1, 1, 4, 4), bad if rank == 1 else 1.0, dtype=torch.float64)
            (strategy.loss(total, images, num_samples=1)).backward()  # type: ignore[no-untyped-call]
            strategy.finish_step(2, step)
            weights = next(strategy.model.parameters()).grad
            assert weights is not None
            assert not weights.isfinite().any()
            strategy.model.zero_grad()


class Large(nn.Module):
    """Its gradient is finite, and larger than a float16 can be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(images), 3) * 1e6


def test_what_a_float16_cannot_hold_ends_the_run_with_what_helps(tmp_path: Path) -> None:
    def run() -> None:
        exact_runs.train(tmp_path, "parallel.exact=false", "parallel.compress=fp16", model=Large())

    def ends() -> str:
        with pytest.raises(DivergedError) as caught:
            run()
        return str(caught.value)

    message, _ = run_workers(ends, 2, process_group=False)
    assert "though each worker's own is" in message
    assert "set parallel.compress = 'bf16', which has float32's range" in message


def test_a_run_resumes_to_the_same_bits_with_what_it_began_with(tmp_path: Path) -> None:
    def run(where: str, *overrides: str) -> None:
        options = ("parallel.exact=false", "parallel.compress=bf16", f"model.name={exact_runs.__name__}:build")
        run_workers(exact_runs.train, 2, args=(tmp_path / where, *options, *overrides), process_group=False)

    def weights(where: str) -> dict[str, torch.Tensor]:
        return read_checkpoint(CheckpointStore(tmp_path / where / "checkpoints").paths()[-1]).model

    run("whole")
    run("in parts", "train.max_steps=7")
    run("in parts")
    run("uncompressed", "parallel.compress=none")
    whole, in_parts, uncompressed = weights("whole"), weights("in parts"), weights("uncompressed")
    assert whole.keys() == in_parts.keys()
    assert all(torch.equal(whole[name], in_parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], uncompressed[name]) for name in whole), "nothing was compressed"
    with pytest.raises(ConfigurationError, match="compress was 'bf16', now 'none'"):
        exact_runs.train(tmp_path / "whole", "parallel.exact=false", f"model.name={exact_runs.__name__}:build")


@pytest.mark.distributed(world_size=1)
def test_one_worker_rounds_nothing_and_no_strategy_for_one_can_be_asked_to() -> None:
    ddp = parallelize(network(), ALONE, ParallelRecipe(strategy="ddp", compress="bf16"))
    assert ddp.reason == "DistributedDataParallel: 1 worker"
    for strategy in ("dp", "none"):
        with pytest.raises(ConfigurationError, match="is for several workers"):
            load_recipe("digits", ["parallel.compress=bf16", f"parallel.strategy={strategy}"])
    with pytest.raises(ConfigurationError, match='compress = "int8" is for the outer steps of sync_every'):
        load_recipe("digits", ["parallel.compress=int8"])
