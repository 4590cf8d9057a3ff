"""What training returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """How a run ended: the same on every rank."""

    run_dir: Path
    step: int
    metrics: dict[str, float]
    """The last evaluation: what the task's `metrics` returned."""

    @property
    def accuracy(self) -> float:
        """The share of correct samples, 0 to 1. Raises AttributeError if the task has no such metric."""
        return self._metric("accuracy")

    @property
    def loss(self) -> float:
        """The mean loss of the evaluation. Raises AttributeError if the task has no such metric."""
        return self._metric("loss")

    def _metric(self, name: str) -> float:
        if name not in self.metrics:
            raise AttributeError(f"the task has no metric {name!r}; Result.metrics has {', '.join(self.metrics)}")
        return self.metrics[name]
