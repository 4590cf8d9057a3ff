"""Values that are not finite: seen before the optimizer steps, agreed by all ranks, dealt with as the recipe says.

Nothing travels for it while all is well. A loss that is not finite makes every gradient of its micro-batch NaN, and the
sum over all workers keeps a NaN: so each rank sees in its own gradients whether anything, anywhere, went wrong. Only
then do the ranks exchange what they know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

from disttrain.data import StepBatch
from disttrain.distributed.collectives import gather_objects, max_
from disttrain.distributed.sharded import local
from disttrain.distributed.world import World
from disttrain.errors import DivergedError
from disttrain.health.diagnosis import TUNE, Finding, NotComputed, Rerun, listed
from disttrain.health.finite import QuickCheck, all_finite
from disttrain.models.buffers import BufferCopies
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import TrainRecipe
from disttrain.task import Task

# A scale of one leaves a gradient as it is: one that is not finite then is not the scaler's doing.
_NO_SCALE = 1.0


@dataclass(frozen=True)
class Incident:
    """A step whose loss or gradient was not finite, and what was done ("skip" or "zero"): the same on every rank.

    `step` counts the steps done with it. `rank` is the first whose loss was not finite, and `samples` are those of its
    slice, as places in the training set; None and empty if all losses were finite. `in_a_row` counts such steps up to
    this one, `total` all of the run. Where workers train apart, it is one worker's, and `rank` is always known.
    """

    step: int
    policy: str
    rank: int | None
    samples: tuple[int, ...]
    in_a_row: int
    total: int

    def words(self, limit: int) -> str:
        """What happened, for a warning; `limit` is how many in a row may."""
        where = f" on rank {self.rank}" if self.rank is not None else ""
        where += f", in {listed(self.samples)}" if self.samples else ""
        what = f"the {'loss' if self.samples else 'gradient'} of step {self.step} is not finite{where}"
        done = "the step is skipped" if self.policy == "skip" else "zeros are put in its place"
        return (
            f"{what}: {done} ({self.in_a_row} of at most {limit} in a row, {self.total} in all; the journal has every "
            "one)."
        )


class Verdict(Enum):
    """What to do with a step, the same on every rank."""

    STEP = auto()
    """The optimizer steps, by way of the scaler, which leaves the step out after an overflow."""
    STEP_WITHOUT_SCALER = auto()
    """The optimizer steps: zeros have replaced what was not finite, and the scaler would still leave the step out."""
    UNLESS_BAD = auto()
    """The optimizer is called, and leaves the step out on the device if `NonFiniteGuard.is_bad` says so."""
    SKIP = auto()
    """The optimizer does not step."""


class NonFiniteGuard:
    """Looks at a step's gradients before the optimizer does. Every rank must call each method, in every step."""

    def __init__(
        self,
        recipe: TrainRecipe,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        world: World,
        autocast: torch.dtype | None,
        task: Task,
        read: Callable[[int, torch.Tensor], Any],
    ) -> None:
        """`read` is as `Rerun` takes it."""
        self._policy, self._limit = recipe.non_finite, recipe.non_finite_limit
        self._strategy, self._optimizer, self._scaler, self._world = strategy, optimizer, scaler, world
        self._parameters = dict(strategy.model.named_parameters())
        self._quick = None if strategy.is_sharded else QuickCheck.of(list(self._parameters.values()))
        self._buffers = BufferCopies(strategy.model)
        self._rerun = Rerun(strategy.model, task, recipe, world.device, autocast, read)
        self._incidents: list[Incident] = []
        self._in_a_row = self._total = 0

    def state(self) -> dict[str, int]:
        """What a checkpoint has of it."""
        return {"in_a_row": self._in_a_row, "total": self._total}

    def load_state(self, state: dict[str, int]) -> None:
        """Put back what `state` gave."""
        self._in_a_row, self._total = state["in_a_row"], state["total"]

    def begin_step(self) -> None:
        """Keep what a step that is not made must leave unchanged."""
        self._buffers.take()

    def undo_step(self, state: dict[str, int]) -> None:
        """Put back the buffers as `begin_step` found them, and what `state` gave then."""
        self._buffers.restore()
        self.load_state(state)
        self._incidents.clear()

    def check(self, step: int, batch: StepBatch, losses: torch.Tensor) -> Verdict:
        """What to do with the step: the gradients are summed and unscaled, and not clipped yet.

        `step` counts the steps done before, `losses`, (num_slices,), are this rank's. Raises DivergedError, on every
        rank alike, if the recipe says that the run ends: weights and buffers are then those before the step.
        """
        if not self._strategy.non_finite and (self._are_known_finite() or self._all_finite()):
            self._in_a_row = 0
            return Verdict.STEP
        return self._judge(step, batch, losses.isfinite().tolist())

    def _judge(self, step: int, batch: StepBatch, are_finite: list[bool]) -> Verdict:
        """What to do with a step that has something not finite; `are_finite`: which of its losses are, by slice."""
        bad = {slice_index for slice_index, finite in enumerate(are_finite) if not finite}
        samples = [sample for part in batch.parts if part.slice_index in bad for sample in part.samples.tolist()]
        by_rank: list[list[int]] = gather_objects(samples)
        rank = next((rank for rank, samples in enumerate(by_rank) if samples), None)
        if rank is None and self._is_overflow():
            return Verdict.STEP  # the scaler leaves the step out by itself, and lowers its scale
        if self._policy == "stop" or self._in_a_row >= self._limit:
            raise DivergedError(self._why_it_ends(step, batch))
        return self._deal_with(step, rank, by_rank[rank] if rank is not None else [])

    def agree(self) -> None:
        """Have all ranks know what each has seen by itself, where workers train apart. Raises as `check` does.

        Includes `catch_up`.
        """

    def catch_up(self) -> None:
        """Look at what was left to be looked at later: before a checkpoint, for one. Raises as `check` does."""

    def is_bad(self) -> torch.Tensor | None:
        """Of a step that is to be made UNLESS_BAD: 1 if it is not to count, else 0, () on the device."""
        return None

    def step_of(self, step: int) -> int:
        """How many steps are done where a run stands that `check` or `agree` has ended, and that counts `step`."""
        return step

    def take_incidents(self) -> list[Incident]:
        """What was not finite since this was asked last, the same on every rank."""
        incidents, self._incidents = self._incidents, []
        return incidents

    def _deal_with(self, step: int, rank: int | None, samples: list[int]) -> Verdict:
        self._count(step, rank, samples)
        self._buffers.restore(only_non_finite=self._policy == "zero")
        self._forget_overflow()
        if self._policy == "skip":
            return Verdict.SKIP
        self._put_zeros()
        return Verdict.STEP_WITHOUT_SCALER

    def _count(self, step: int, rank: int | None, samples: list[int]) -> None:
        self._in_a_row, self._total = self._in_a_row + 1, self._total + 1
        self._incidents.append(Incident(step + 1, self._policy, rank, tuple(samples), self._in_a_row, self._total))

    def _are_known_finite(self) -> bool:
        # Without a scaler: divided by a scale below one, a finite number may become infinite.
        return self._strategy.sums_are_finite and not self._scaler.is_enabled()

    def _all_finite(self) -> bool:
        if self._quick is not None and (quickly := self._quick.all_finite()) is not None:
            return quickly
        finite = all_finite(self._gradients())
        if self._strategy.is_sharded:  # each rank has looked at its shards alone
            finite = not max_(torch.tensor(0.0 if finite else 1.0))
        return finite

    def _gradients(self) -> list[torch.Tensor]:
        gradients = [local(parameter.grad) for parameter in self._parameters.values() if parameter.grad is not None]
        return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]

    def _scale(self) -> float:
        return self._scaler.get_scale() if self._scaler.is_enabled() else _NO_SCALE

    def _is_overflow(self) -> bool:
        """Whether the scale alone may have done it, all losses being finite. It has to do with gradients only."""
        only_gradients = set(self._strategy.non_finite) <= self._parameters.keys()
        return self._scale() > _NO_SCALE and only_gradients

    def _forget_overflow(self) -> None:
        """Have the scaler continue as if the step had not been: what it found was not an overflow."""
        if self._scaler.is_enabled():
            self._scaler.update(self._scaler.get_scale())

    def _put_zeros(self) -> None:
        self._strategy.sum_finite_parts(self._scale())
        for gradient in self._gradients():
            torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def _why_it_ends(self, step: int, batch: StepBatch) -> str:
        self._optimizer.zero_grad(set_to_none=True)
        with self._strategy.made_whole():
            mine = self._rerun.find_first(batch, step, self._scale(), self._buffers.restore)
        return self._words(step, self._gathered(mine))

    def _gathered(self, mine: Finding | NotComputed | None) -> list[Finding | NotComputed | None]:
        return gather_objects(mine)

    def _words(self, step: int, by_rank: list[Any]) -> str:
        """Why the run ends, by what each rank has found."""
        found = [(one.slice_index, one.part, rank) for rank, one in enumerate(by_rank) if isinstance(one, Finding)]
        row = "" if self._policy == "stop" else f" in {self._in_a_row + 1} steps in a row (train.non_finite_limit)"
        hint = '; train.non_finite = "skip" continues without such steps' if self._policy == "stop" else ""
        if not found:
            unknown = [(rank, one.reason) for rank, one in enumerate(by_rank) if isinstance(one, NotComputed)]
            what = f"the gradient of the global batch is not finite at step {step + 1}{row}"
            if unknown:
                return (
                    f"{what}; why is not known, since rank {unknown[0][0]} failed to compute it again: "
                    f"{unknown[0][1]}. The step was not taken. To continue, {TUNE}{hint}."
                )
            return (
                f"{what}, though each worker's own is. The step was not taken. To continue, "
                f"{self._strategy.against_overflow}{hint}."
            )
        rank = min(found)[-1]
        first = by_rank[rank]
        comparison = f" ({first.comparison})" if first.comparison else ""
        return (
            f"{first.what} is not finite at step {step + 1}{comparison}, first on rank {rank}, in "
            f"{listed(first.samples)} of the training set{row}. The step was not taken. To continue, "
            f"{first.advice}{hint}."
        )


def marked(gradient: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The gradient that a backward pass begins with; NaN, as all that follow from it, if the loss is not finite.

    `share`: the loss, or what it adds to the step's.
    """
    return torch.add(gradient, share, alpha=0.0)
