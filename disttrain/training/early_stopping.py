"""The best evaluation so far, and whether a run ends because none has been better for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disttrain.errors import ConfigurationError, in_digits
from disttrain.layout import EVAL, Best
from disttrain.recipe import Recipe, TrainRecipe
from disttrain.task import Task


def best_metric(recipe: Recipe, task: Task) -> Best:
    """The metric that decides which evaluation is the best: the recipe's, or else the task's.

    Raises ConfigurationError for a task whose `best` does not say it.
    """
    if recipe.checkpoint.best is None:
        best: Any = task.best
        if not isinstance(best, tuple | list) or len(best) != 2 or not all(isinstance(one, str) for one in best):
            raise ConfigurationError(
                f"{type(task).__name__}.best is {best!r}: it has to be the name of a metric and 'min' or 'max', as in "
                "('loss', 'min')."
            )
        return Best(*best)
    metric, _, mode = recipe.checkpoint.best.rpartition(":")
    return Best(metric.removeprefix(EVAL), mode)


class EarlyStopping:
    """Every rank keeps it from the same metrics, so all end at the same evaluation without communicating."""

    def __init__(self, recipe: TrainRecipe, best: Best) -> None:
        self._patience, self._min_delta = recipe.patience, recipe.min_delta
        self._best = best
        self.value: float | None = None
        """The best value of the metric that decides; None before the first evaluation that has one."""
        self.step = 0
        """The step of the evaluation that it is of."""
        self.since = 0
        """How many evaluations were made since without one that is better."""

    @property
    def has_stopped(self) -> bool:
        """Whether the run is over."""
        return 0 < self._patience <= self.since

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let an evaluation count; its metric has to be better by more than `train.min_delta`. NaN is never better."""
        score = self._best.score(metrics)
        before = None if self.value is None else self._best.score({self._best.metric: self.value})
        if score is not None and (before is None or score > before + self._min_delta):
            self.value, self.step, self.since = metrics[self._best.metric], step, 0
        else:
            self.since += 1

    def words(self) -> str:
        """Why the run is over."""
        what = f"no evaluation of the last {self.since} was better"
        if self.value is None:
            return f"{what}: none had a {self._best.metric} that is a number (train.patience)"
        what += f" than {self._best.metric} {in_digits(self.value, 6)} at step {self.step}"
        if self._min_delta == 0:
            return f"{what} (train.patience)"
        return f"{what} by more than {self._min_delta:g} (train.patience, train.min_delta)"

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {"value": self.value, "step": self.step, "since": self.since}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
