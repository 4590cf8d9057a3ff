"""Values that are not finite, on a device that works behind the host's back: left out there, and dealt with later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from disttrain.data import StepBatch
from disttrain.distributed import later
from disttrain.distributed.collectives import max_
from disttrain.distributed.world import World
from disttrain.health.finite import flag_of_non_finite
from disttrain.health.nonfinite import NonFiniteGuard, Verdict
from disttrain.health.nonfinite_apart import ApartNonFiniteGuard
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import Recipe


def guard_of(
    recipe: Recipe,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World,
    *,
    has_hooks: bool,
) -> type[NonFiniteGuard]:
    """Which guard a run has: one that looks a step later where everything else allows it.

    What must know of each step at once does not: hooks and spikes, which look at it, zeros in the place of bad numbers,
    and an optimizer that cannot leave a step out by itself.
    """
    if strategy.trains_apart:
        return ApartNonFiniteGuard
    looks_at_once = (
        strategy.is_sharded
        or strategy.looks_at_sums
        or has_hooks
        or recipe.train.non_finite == "zero"
        or recipe.train.spike_factor > 0
    )
    if looks_at_once or not later.is_asynchronous(world.device) or not _can_leave_out(optimizer, world.device):
        return NonFiniteGuard
    return LateNonFiniteGuard


def _can_leave_out(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    if any(parameter.device != device for group in optimizer.param_groups for parameter in group["params"]):
        return False
    return heeds_found_inf(optimizer)


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step leaves all as it was where `found_inf` is 1, as torch's fused ones do.

    See torch/amp/grad_scaler.py. torch has it follow from what is said for all groups; here each group counts.
    """
    if type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        # With dampening a first step that is left out would take its place: see `training.momentum.begin_momentum`.
        return all(
            group["fused"] and not (group.get("momentum") and group["dampening"]) for group in optimizer.param_groups
        )
    return getattr(optimizer, "heeds_found_inf", False) is True


@dataclass(frozen=True)
class _Unseen:
    """A step that the device has judged: its flag there, and what the host is to know of it on the way there.

    `seen`: whether the optimizer has left it out, whether it counts as bad, and its losses.
    """

    step: int
    batch: StepBatch
    is_bad: torch.Tensor
    seen: Callable[[], torch.Tensor]


class LateNonFiniteGuard(NonFiniteGuard):
    """Waits for no step: whether it is bad is known on the device: optimizer, averages, buffers and loss scale heed it.

    The host reads it when it has issued the next step's forward and backward passes, or in `catch_up`. All ranks read
    the same at the same step, since all have the same sums. A step that ends the run has then been left out, and of
    the next one nothing is kept.
    """

    _unseen: _Unseen | None = None
    _judged_late: int | None = None

    def begin_step(self) -> None:
        """As `NonFiniteGuard` has it."""
        self._heed(None)
        super().begin_step()

    def check(self, step: int, batch: StepBatch, losses: torch.Tensor) -> Verdict:
        """As `NonFiniteGuard` has it, of the step before; this one is made UNLESS_BAD."""
        self.catch_up()
        is_left_out = is_bad = flag_of_non_finite(self._gradients(), self._world.device)
        if self._scaler.is_enabled():
            is_bad = self._without_overflow(is_left_out, losses)
        if not self._buffers.restore_if(is_bad):
            return super().check(step, batch, losses)
        if self._scaler.is_enabled():
            self._update_scale(is_bad)
        self._heed(is_left_out)
        seen = later.to_host_later(torch.cat([torch.stack([is_left_out, is_bad]), losses.float()]))
        self._unseen = _Unseen(step, batch, is_bad, seen)
        return Verdict.UNLESS_BAD

    @torch.no_grad()
    def _without_overflow(self, is_left_out: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """The flag, 0 if the scale alone may have done it, as `_is_overflow` has it: all losses of all ranks finite."""
        scale = self._scaler._get_scale_async()
        assert scale is not None, "a loss has been scaled"
        has_bad_loss = 1.0 - losses.isfinite().all().to(is_left_out.dtype)
        if self._world.size > 1:
            max_(has_bad_loss)
        return is_left_out * torch.where(scale > 1.0, has_bad_loss, 1.0)

    @torch.no_grad()
    def _update_scale(self, is_bad: torch.Tensor) -> None:
        """As `GradScaler.update` has it, without a wait; a bad step, which is no overflow, changes nothing."""
        scaler: Any = self._scaler  # its own `update` can be told a scale, and not whether to keep it
        numbers = [scaler._scale, scaler._growth_tracker]
        before = [number.clone() for number in numbers]
        scaler.update()
        for number, old in zip(numbers, before, strict=True):
            torch.where(is_bad == 1, old, number, out=number)

    def agree(self) -> None:
        """As `NonFiniteGuard` has it."""
        self.catch_up()

    def catch_up(self) -> None:
        """As `NonFiniteGuard` has it. Every rank must call it, at the same step."""
        unseen, self._unseen = self._unseen, None
        if unseen is None:
            return
        is_left_out, is_bad, *losses = unseen.seen().tolist()
        if not is_left_out:
            self._in_a_row = 0
        if not is_bad:
            return  # if it was left out, it is an overflow: the scaler's business
        self._judged_late = unseen.step
        self._judge(unseen.step, unseen.batch, [math.isfinite(loss) for loss in losses])
        self._judged_late = None

    def is_bad(self) -> torch.Tensor | None:
        """As `NonFiniteGuard` has it."""
        return None if self._unseen is None else self._unseen.is_bad

    def step_of(self, step: int) -> int:
        """As `NonFiniteGuard` has it."""
        return step if self._judged_late is None else self._judged_late

    def _deal_with(self, step: int, rank: int | None, samples: list[int]) -> Verdict:
        if self._judged_late is None:
            return super()._deal_with(step, rank, samples)
        self._count(step, rank, samples)  # the rest was done on the device
        return Verdict.SKIP

    def _heed(self, is_bad: torch.Tensor | None) -> None:
        optimizer: Any = self._optimizer
        optimizer.found_inf = is_bad
