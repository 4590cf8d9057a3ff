"""Values that are not finite on one of several workers that train apart: dealt with there, told when they meet."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from disttrain.data import StepBatch
from disttrain.distributed.collectives import gather_objects, max_
from disttrain.errors import DivergedError
from disttrain.health.diagnosis import TUNE, Finding, NotComputed
from disttrain.health.nonfinite import Incident, NonFiniteGuard, Verdict


class ApartNonFiniteGuard(NonFiniteGuard):
    """Each rank decides for itself until `agree`, and one that would end the run makes no steps until then."""

    _ending: str | None = None
    _untold: tuple[Incident, ...] = ()  # what the other ranks do not know of yet

    def check(self, step: int, batch: StepBatch, losses: torch.Tensor) -> Verdict:
        """As `NonFiniteGuard` has it, for this rank alone; what ends the run is raised by `agree`."""
        if self._ending is None and self._all_finite():
            self._in_a_row = 0
            return Verdict.STEP
        is_bad_loss = not bool(losses.isfinite().all())
        if self._ending is None and not is_bad_loss and self._is_overflow():
            return Verdict.STEP
        if self._ending is None and (self._policy == "stop" or self._in_a_row >= self._limit):
            self._ending = self._why_it_ends(step, batch)
        if self._ending is not None:
            self._buffers.restore(only_non_finite=False)
            self._forget_overflow()
            return Verdict.SKIP
        samples = [sample for part in batch.parts for sample in part.samples.tolist()] if is_bad_loss else []
        verdict = self._deal_with(step, self._world.rank, samples)
        self._untold += tuple(super().take_incidents())
        return verdict

    def agree(self) -> None:
        """As `NonFiniteGuard` has it. Every rank must call it."""
        if not max_(torch.tensor(1.0 if self._untold or self._ending is not None else 0.0)):
            return
        by_rank: list[tuple[tuple[Incident, ...], str | None]] = gather_objects((self._untold, self._ending))
        everywhere = [incident for incidents, _ in by_rank for incident in incidents]
        self._incidents, self._untold = sorted(everywhere, key=lambda incident: incident.step), ()
        ending = next((words for _, words in by_rank if words is not None), None)
        if ending is not None:
            raise DivergedError(ending)

    @property
    def ends(self) -> bool:
        """Whether `agree` will raise."""
        return self._ending is not None

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint has of this rank's. There is none while `ends` holds on any."""
        return {**self.state(), "incidents": [asdict(one) for one in self._untold]}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Put back what `own_state` gave. Raises KeyError or TypeError for anything else."""
        self.load_state(state)
        self._untold = tuple(Incident(**{**one, "samples": tuple(one["samples"])}) for one in state["incidents"])

    def _gathered(self, mine: Finding | NotComputed | None) -> list[Finding | NotComputed | None]:
        return [mine if rank == self._world.rank else None for rank in range(self._world.size)]

    def _words(self, step: int, by_rank: list[Any]) -> str:
        if any(one is not None for one in by_rank):
            return super()._words(step, by_rank)
        return (
            f"the gradient of rank {self._world.rank} is not finite at step {step + 1}. The step was not taken. To "
            f"continue, {TUNE}."
        )
