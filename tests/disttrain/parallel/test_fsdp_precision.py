"""FSDP2's mixed precision: weights are gathered in bfloat16, and what each worker keeps stays float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from disttrain.checkpoint import weights_sha256
from disttrain.distributed.sharded import local
from disttrain.distributed.world import World, join_world
from disttrain.errors import ConfigurationError
from disttrain.parallel.fsdp import Fsdp
from disttrain.recipe import ParallelRecipe
from disttrain.testing import run_workers
from tests.disttrain.parallel.test_fsdp import FSDP, newest, train

AUTOCAST = ("train.precision=bf16", FSDP)
GATHERED = (*AUTOCAST, "parallel.param_dtype=bf16")


def test_a_run_is_that_of_autocast_up_to_rounding_resumes_to_its_bits_and_saves_float32(folder: Path) -> None:
    def runs() -> None:
        for name, overrides in (
            ("autocast", AUTOCAST),
            ("gathered", GATHERED),
            ("stopped", (*GATHERED, "train.max_steps=3")),
            ("stopped", GATHERED),
        ):
            train(folder, name, *overrides)

    run_workers(runs, 2, process_group=False)
    autocast, gathered, stopped = (newest(folder / name) for name in ("autocast", "gathered", "stopped"))
    for tensors in (gathered.model, gathered.optimizer):  # with the averages of the weights
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert weights_sha256(stopped.model) == weights_sha256(gathered.model) != weights_sha256(autocast.model)
    assert weights_sha256(stopped.optimizer) == weights_sha256(gathered.optimizer)
    assert gathered.state["metrics"]["eval/loss"] == pytest.approx(autocast.state["metrics"]["eval/loss"], rel=0.02)


class Noting(nn.Linear):
    """Notes the types that its weight and its input have."""

    def __init__(self, noted: list[torch.dtype]) -> None:
        super().__init__(4, 4)
        self.noted = noted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.noted += [self.weight.dtype, x.dtype]
        return super().forward(x)


def test_what_is_gathered_and_summed_is_of_the_types_of_the_policy() -> None:
    def gradients(keys: dict[str, Any]) -> tuple[list[torch.dtype], list[torch.Tensor]]:
        noted: list[torch.dtype] = []
        torch.manual_seed(0)
        model = nn.Sequential(Noting(noted), *(nn.Sequential(Noting(noted)) for _ in range(2)))
        with join_world("cpu", threads=1) as world:
            strategy = Fsdp(model, world, ParallelRecipe(strategy="fsdp", **keys))
            batch = torch.arange(8.0).view(2, 4) + 100.3 * world.rank
            with torch.autocast("cpu", torch.bfloat16):
                loss = strategy.loss(lambda model, batch: model(batch).sum(), batch, num_samples=2)
            loss.backward()  # type: ignore[no-untyped-call]
            assert all(local(one.detach()).dtype == torch.float32 for one in model.parameters())
            return noted, [local(one.grad) for one in model.parameters() if one.grad is not None]

    def is_rounded(one: torch.Tensor) -> bool:
        return bool((one == one.bfloat16().float()).all())

    bf16, fp32 = torch.bfloat16, torch.float32
    for noted, found in run_workers(gradients, 2, args=({"param_dtype": "bf16"},), process_group=False):
        assert noted == [bf16, fp32, bf16, bf16, bf16, bf16], "the batch stays as it is"
        assert len(found) == 6
        assert all(one.dtype == fp32 for one in found)
        assert not all(map(is_rounded, found))
    for noted, found in run_workers(gradients, 2, args=({"reduce_dtype": "bf16"},), process_group=False):
        assert noted[::2] == [fp32] * 3
        assert all(one.dtype == fp32 for one in found)
        assert all(map(is_rounded, found))


def test_float32_statistics_are_refused_by_name() -> None:
    def refused() -> str:
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        with join_world("cpu", threads=1) as world, pytest.raises(ConfigurationError) as caught:
            Fsdp(model, world, ParallelRecipe(strategy="fsdp", param_dtype="bf16"))
        return str(caught.value)

    for said in run_workers(refused, 2, process_group=False):
        assert "'0.1' is a BatchNorm1d, whose statistics are float32" in said


def test_norms_outside_the_blocks_take_numbers_of_any_type() -> None:
    def losses() -> list[float]:
        found = []
        with join_world("cpu", threads=1) as world:
            for keys in ({}, {"param_dtype": "bf16"}):
                torch.manual_seed(0)
                norms = (nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4))
                model = nn.Sequential(*norms, *(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)), nn.LayerNorm(4))
                strategy = Fsdp(model, world, ParallelRecipe(strategy="fsdp", **keys))
                batch = torch.arange(8.0).view(2, 4)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = strategy.loss(lambda model, batch: model(batch).square().sum(), batch, num_samples=2)
                loss.backward()  # type: ignore[no-untyped-call]
                found.append(loss.item())
        return found

    for autocast, gathered in run_workers(losses, 2, process_group=False):
        assert gathered == pytest.approx(autocast, rel=0.02)


class Residual(nn.LayerNorm):
    """A norm that is given more than what it normalises."""

    def forward(self, numbers: torch.Tensor, *, residual: torch.Tensor | None) -> torch.Tensor:
        return super().forward(numbers if residual is None else numbers + residual)


class ByHand(nn.LayerNorm):
    """A norm whose module is never called."""

    def normalised(self, numbers: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(numbers, (4,), self.weight, self.bias)


class Headed(nn.Module):
    """Two blocks, and two norms after them, the second of which gets float32."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.norm, self.last, self.by_hand = Residual(4), ByHand(4), by_hand

    def forward(self, numbers: torch.Tensor) -> Any:
        for block in self.blocks:
            numbers = block(numbers)
        found = self.norm(self.norm(numbers, residual=None), residual=torch.ones(4)).float()
        return self.last.normalised(found) if self.by_hand else found


def test_norms_outside_the_blocks_may_be_given_anything_and_are_named_where_they_are_functions() -> None:
    def loss(world: World, *, by_hand: bool) -> torch.Tensor:
        strategy = Fsdp(Headed(by_hand=by_hand), world, ParallelRecipe(strategy="fsdp", param_dtype="bf16"))
        with torch.autocast("cpu", torch.bfloat16):
            return strategy.loss(lambda model, batch: model(batch).square().sum(), torch.ones(2, 4), num_samples=2)

    def computed() -> tuple[bool, str]:
        with join_world("cpu", threads=1) as world:
            with pytest.raises(ConfigurationError) as caught:
                loss(world, by_hand=True)
            return bool(loss(world, by_hand=False).isfinite()), str(caught.value)

    for is_finite, said in run_workers(computed, 2, process_group=False):
        assert is_finite
        assert "a norm outside the blocks that is called as a function" in said
