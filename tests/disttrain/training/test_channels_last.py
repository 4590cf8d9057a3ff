"""Weights in the order of pixels: kept through training, checkpoints and resumes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.checkpoint import optimizer_from_tensors, optimizer_to_tensors
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError
from disttrain.models.start import why_nothing_is_turned
from disttrain.recipe import load_recipe, parse_recipe
from disttrain.training.given import Given
from disttrain.training.job import build_job
from disttrain.training.loop import train_step
from disttrain.training.optim import build_optimizer
from disttrain.training.sharding import refuse_unshardable
from tests.disttrain.parallel.exact_runs import SMALL, build, outcome, train

LAST = ("train.channels_last=true", "model.name=tests.disttrain.parallel.exact_runs:build", "optim.momentum=0.9")


def test_weights_and_what_convolutions_compute_keep_the_order_of_pixels() -> None:
    seen = []
    with join_world("cpu", threads=1) as world:
        torch.manual_seed(0)
        job = build_job(load_recipe("digits", [*SMALL, *LAST]), world, Given(model=build(3, (3, 32, 32))))
        weight = job.model.get_parameter("0.weight")
        job.model.get_submodule("1").register_forward_hook(lambda module, images, output: seen.append(output))
        train_step(job, next(iter(job.loader.epoch(0))))
        job.close()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in [weight, *seen])
    assert not weight.is_contiguous()


def test_a_resumed_run_has_the_bits_of_one_at_once(tmp_path: Path) -> None:
    train(tmp_path / "whole", *LAST)
    train(tmp_path / "parts", *LAST, "train.max_steps=3")
    train(tmp_path / "parts", *LAST)
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert (whole.weights, whole.optimizer) == (parts.weights, parts.optimizer)


@pytest.mark.parametrize("options", [{"name": "sgd", "momentum": 0.9}, {"name": "adamw"}])
def test_fused_kernels_find_what_was_saved_in_the_order_of_the_weights(options: dict[str, Any]) -> None:
    """They go through weights and state side by side, as both lie in memory; a file has its own order."""
    recipe = parse_recipe({"optim": {"lr": 0.1, "fused": True, **options}}).optim
    torch.manual_seed(0)
    gradients = [torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    model = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe, model.parameters())
    for step, gradient in enumerate(gradients):
        if step == 1:
            resumed = copy.deepcopy(model)
            tensors, rest = optimizer_to_tensors(optimizer, model)
            stored = {name: one.clone(memory_format=torch.contiguous_format) for name, one in tensors.items()}
            other = build_optimizer(recipe, resumed.parameters())
            optimizer_from_tensors(other, stored, rest, resumed)
            resumed.weight.grad = gradient
            other.step()
        model.weight.grad = gradient
        optimizer.step()
    assert torch.equal(model.weight, resumed.weight)


def test_sharded_weights_cannot_be_kept_so() -> None:
    recipe = load_recipe("digits", [*LAST, "parallel.strategy=fsdp"])
    with join_world("cpu") as world, pytest.raises(ConfigurationError, match=r"combined with train\.channels_last"):
        refuse_unshardable(recipe, replace(world, size=2), Given())


def test_a_model_without_convolutions_has_nothing_to_turn() -> None:
    assert why_nothing_is_turned(nn.Conv2d(1, 2, 3)) is None
    assert "no effect" in (why_nothing_is_turned(nn.Linear(2, 2)) or "")
