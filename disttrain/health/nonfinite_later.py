"""Values that are not finite, on a device that works behind the host's back: left out there, and dealt with later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from disttrain.data import StepBatch
from disttrain.distributed import later
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

    What must know of each step at once does not: hooks and spikes, which look at it, a loss scale, zeros in the place
    of bad numbers, and an optimizer that cannot leave a step out by itself.
    """
    if strategy.trains_apart:
        return ApartNonFiniteGuard
    looks_at_once = (
        strategy.is_sharded
        or strategy.looks_at_sums
        or has_hooks
        or scaler.is_enabled()
        or recipe.train.non_finite == "zero"
        or recipe.train.spike_factor > 0
    )
    if looks_at_once or not later.is_asynchronous(world.device) or not _can_leave_out(optimizer, world.device):
        return NonFiniteGuard
    return LateNonFiniteGuard


def _can_leave_out(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer's step heeds `found_inf`, as torch's fused ones do (see torch/amp/grad_scaler.py)."""
    if any(parameter.device != device for group in optimizer.param_groups for parameter in group["params"]):
        return False
    if type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        # With dampening a first step that is left out would take its place: see `training.momentum.begin_momentum`.
        return all(
            group["fused"] and not (group.get("momentum") and group["dampening"]) for group in optimizer.param_groups
        )
    return getattr(optimizer, "heeds_found_inf", False) is True


@dataclass(frozen=True)
class _Unseen:
    """A step that the device has judged: its flag there, and the flag and losses on their way to the host."""

    step: int
    batch: StepBatch
    is_bad: torch.Tensor
    seen: Callable[[], torch.Tensor]


class LateNonFiniteGuard(NonFiniteGuard):
    """Waits for no step: whether it is bad is known on the device, where optimizer, averages and buffers heed it.

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
        is_bad = flag_of_non_finite(self._gradients(), self._world.device)
        if not self._buffers.restore_if(is_bad):
            return super().check(step, batch, losses)
        self._heed(is_bad)
        self._unseen = _Unseen(step, batch, is_bad, later.to_host_later(torch.cat([is_bad.view(1), losses.float()])))
        return Verdict.UNLESS_BAD

    def agree(self) -> None:
        """As `NonFiniteGuard` has it."""
        self.catch_up()

    def catch_up(self) -> None:
        """As `NonFiniteGuard` has it. Every rank must call it, at the same step."""
        unseen, self._unseen = self._unseen, None
        if unseen is None:
            return
        is_bad, *losses = unseen.seen().tolist()
        if not is_bad:
            self._in_a_row = 0
            return
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
