"""An optimizer's step on this rank's parts of sharded parameters: the bits and the state of a step on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.distributed.sharded import is_sharded, local
from disttrain.distributed.world import join_world
from disttrain.parallel.fsdp import Fsdp
from disttrain.recipe import ParallelRecipe
from disttrain.testing import run_workers
from disttrain.training.parts import on_parts

KINDS = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop")


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, *, in_parts: bool) -> list[torch.Tensor]:
    """Two steps, of which the first has no gradient for a parameter; then this rank's parts of all there is."""
    for step in range(2):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = None if step == number == 0 else torch.ones_like(parameter) * (number + step + 0.3)
        if in_parts:
            with on_parts(optimizer):
                optimizer.step()
        else:
            optimizer.step()
        assert all(one.grad is None or is_sharded(one.grad) for one in model.parameters())
    state = [value for one in model.parameters() for _, value in sorted(optimizer.state[one].items())]
    assert all(is_sharded(value) for value in state if isinstance(value, torch.Tensor) and value.ndim)
    assert all(is_sharded(one) for group in optimizer.param_groups for one in group["params"])
    tensors = [*model.parameters(), *(value for value in state if isinstance(value, torch.Tensor))]
    return [local(tensor.detach()).clone() for tensor in tensors]


def test_a_step_has_the_bits_and_the_state_that_it_has_on_sharded_tensors() -> None:
    def different() -> list[str]:
        found = []
        with join_world("cpu", threads=1) as world:
            for kind in KINDS:
                both = []
                for in_parts in (False, True):
                    torch.manual_seed(0)
                    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))  # rank 1 has no part of the last weight
                    Fsdp(model, world, ParallelRecipe(strategy="fsdp"))
                    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
                    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, weight_decay=0.1, **options)
                    both.append(stepped(optimizer, model, in_parts=in_parts))
                if not all(map(torch.equal, *both)) or len(both[0]) != len(both[1]):
                    found.append(kind)
        return found

    assert run_workers(different, 2, process_group=False) == [[], []]


def test_a_step_that_fails_leaves_the_optimizer_its_sharded_parameters() -> None:
    def is_whole() -> bool:
        with join_world("cpu", threads=1) as world:
            model = nn.Sequential(nn.Linear(3, 3))
            Fsdp(model, world, ParallelRecipe(strategy="fsdp"))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with pytest.raises(ValueError, match="in between"), on_parts(optimizer):
                raise ValueError("in between")
            return optimizer.param_groups[0]["params"] == list(model.parameters()) and optimizer.state == {}

    assert run_workers(is_whole, 2, process_group=False) == [True, True]
