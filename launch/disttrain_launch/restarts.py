"""Whether a group of workers that failed is restarted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from disttrain.errors import ExitCode
from disttrain.runs.summary import newest_step
from disttrain_launch.outcome import Outcome


class Restarts:
    """As many restarts as are allowed, and as make sense: a run that fails again without a new step is given up.

    Args:
        most: how many.
        run_dir: the folder of the run, whose journal and checkpoints show its progress.
        stops_after_loss: whether a worker that is killed, or a machine that is lost, ends the run, whatever is allowed.
    """

    def __init__(self, most: int = 0, run_dir: Path | None = None, *, stops_after_loss: bool = False) -> None:
        self.most, self.made, self._stops_after_loss = most, 0, stops_after_loss
        self.gave_up: str | None = None
        """Why the run is not restarted although restarts are left, if that is so."""
        self._run_dir = run_dir
        self._failed_at: int | None = None

    def helps(self, outcome: Outcome) -> bool:
        """Whether to restart the workers after this outcome; to be called once for each."""
        if ExitCode.is_final(outcome.exit_code):
            return False
        if self._is_the_end(outcome):
            self.gave_up = 'parallel.on_lost_worker is "stop": not restarting'
            return False
        if self.made >= self.most:
            return False
        before, self._failed_at = self._failed_at, (self._run_dir and newest_step(self._run_dir)) or 0
        if before is not None and self._failed_at == before:  # not <=: a damaged line may have shown too many
            self.gave_up = f"it failed again without completing a step since the restart (step {before}): giving up"
            return False
        self.made += 1
        return True

    def settled(self, outcome: Outcome) -> Outcome:
        """The outcome with which the run ends: with a code that no scheduler retries, where a loss is to be the end."""
        return replace(outcome, exit_code=ExitCode.LOST) if self._is_the_end(outcome) else outcome

    def _is_the_end(self, outcome: Outcome) -> bool:
        return outcome.is_loss and self._stops_after_loss
