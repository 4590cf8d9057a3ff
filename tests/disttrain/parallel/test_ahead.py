"""Sums by collectives begin within the backward pass of a worker's last slice, with the bits of sums that do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError
from disttrain.parallel.exact import ahead
from disttrain.parallel.exact.slices import ExactSlices
from disttrain.testing import run_workers

NUM_SLICES = 4
STEPS = ("first", "as expected", "too large", "as expected", "not finite", "first", "changed", "as expected")


class Stack(nn.Module):
    """Its lower half calls `note` before its backward pass. A parameter is used in slice 1 alone, another by nobody."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sometimes = nn.Parameter(torch.ones(5))
        self.lower = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.upper = nn.Linear(6, 3)
        self.idle = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))  # its gradient is one to be conjugated
        self.note = note

    def forward(self, numbers: torch.Tensor, *, uses_it: bool) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(self.lower(numbers * self.sometimes if uses_it else numbers))
        hidden.register_hook(lambda _: self.note())
        scores: torch.Tensor = self.upper(hidden) * self.frozen * (self.wave.conj() * 2).real
        return scores


def in_place(parameter: Any) -> None:
    parameter.grad.mul_(0.75)


def by_another(parameter: Any) -> None:
    parameter.grad = parameter.grad * 0.75


def unversioned(parameter: Any) -> None:
    parameter.grad.data.mul_(0.75)


def trained(change: Callable[[Any], None]) -> tuple[list[Any], list[list[int]], int]:
    """By step: all that it leaves behind; and how many pieces were on their way halfway through each backward pass."""
    left, on_their_way = [], []
    sent = 0

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        return real(tensor, *arguments, **options)

    with join_world("cpu", threads=1, most_sharing_memory=0) as world, pytest.MonkeyPatch.context() as patch:
        real = torch.distributed.all_reduce
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        patch.setattr(ahead, "_MOST_TOGETHER", {"cpu": 1})
        seen: list[int] = []
        model = Stack(lambda: seen.append(sent))
        slices = ExactSlices(model, world, NUM_SLICES)
        for step, what in enumerate(STEPS):
            sent, seen[:] = 0, []
            for index in slices.slices:
                slices.open()
                numbers = torch.randn(7, 5, generator=torch.Generator().manual_seed(NUM_SLICES * step + index))
                numbers[:, 0] *= 1e-16  # so little that it shows on which grid gradients were summed
                loss = model(numbers, uses_it=index == 1).square().sum()
                if what == "too large":
                    loss = loss * 1e6
                if what == "not finite" and index == 2:
                    loss = loss * math.inf
                if index == slices.slices[-1]:
                    slices.begin_sum()
                loss.backward()
                if what == "changed":  # as by a hook of the user's that runs when all gradients are there
                    change(model.upper.weight)
                slices.close(index)
            slices.finish(NUM_SLICES)
            names = slices.non_finite
            slices.sum_finite_parts(1.0)
            gradients = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
            left.append((names, slices.expected, *gradients, *(one.clone() for one in model.buffers())))
            on_their_way.append(list(seen))
            model.zero_grad()
        slices.open()
        model.idle.grad = torch.ones(1).to_sparse()  # dense in the trial before training, and no longer
        with pytest.raises(ConfigurationError, match="the gradient of 'idle' is sparse"):
            slices.close(slices.slices[0])
        hooks = sum(len(one._post_accumulate_grad_hooks or ()) for one in model.parameters())  # type: ignore[attr-defined]
    return left, on_their_way, hooks


def bits(left: list[Any]) -> list[Any]:
    return [[one.numpy().tobytes() if isinstance(one, torch.Tensor) else one for one in step] for step in left]


def test_sums_begin_within_the_backward_pass_and_have_the_same_bits() -> None:
    """Also where a gradient is too large, not finite, changed after it was sent, or not there on each worker."""
    ((alone, seen, _),) = run_workers(trained, 1, args=(in_place,), process_group=False)
    assert not any(map(sum, seen)), "one worker sends nothing"
    assert [bool(names) for names, *_ in alone] == [what == "not finite" for what in STEPS]
    for size, change in ((2, in_place), (3, by_another), (4, unversioned)):
        for left, seen, hooks in run_workers(trained, size, args=(change,), process_group=False):
            assert bits(left) == bits(alone)
            assert hooks == 0
            # The upper layer's weight and bias, before the lower one's are computed; nothing before the last slice.
            for what, (*earlier, last) in list(zip(STEPS, seen, strict=True))[:-1]:
                assert (sum(earlier), last) == (0, 0 if what == "first" else 2), what
            assert seen[-1][-1] == 0, "a gradient was changed after it had been sent: that may happen again"
