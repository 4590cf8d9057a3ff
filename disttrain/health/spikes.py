"""A loss far above the recent ones: the run goes back to a checkpoint, and leaves the step out that showed it.

Which steps are left out is kept in the run directory, where going back does not undo it. Were it lost, nothing else
would come of the run: the losses, of which the newest are part of every checkpoint, lead to the same decision again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from disttrain.errors import ConfigurationError
from disttrain.files import parse_json, read_text, replace_file
from disttrain.layout import SPIKES
from disttrain.recipe import TrainRecipe


class RolledBack(Exception):
    """The run is to be opened again, at its newest checkpoint. `address`: where it lives."""

    def __init__(self, address: str) -> None:
        super().__init__("rolled back to a checkpoint")
        self.address = address


class SpikeGuard:
    """Looks at the loss of every step, the same on every rank.

    `recent` are the losses of the last steps, oldest first, and part of the run's state; `skipped` are the steps,
    counted from 0, that are left out.
    """

    def __init__(self, recipe: TrainRecipe) -> None:
        self.factor, self.limit = recipe.spike_factor, recipe.spike_limit
        self._window = recipe.spike_window
        self.recent: list[float] = []
        self.skipped: frozenset[int] = frozenset()

    @property
    def is_on(self) -> bool:
        """Whether it is on."""
        return self.factor > 0

    def normal_loss(self, loss: float) -> float | None:
        """The median of the recent losses if `loss` is a spike above it; else None, and it is one of them from now on.

        Nothing is a spike before half a window of losses is known, nor is a loss that is not finite: see `finite`.
        """
        if not math.isfinite(loss):
            return None
        if len(self.recent) >= (self._window + 1) // 2:
            usual = median(self.recent)
            # A loss may be below zero, as that of a density: its multiple would be below every one of them.
            if loss > (self.factor if usual >= 0 else 2 - self.factor) * usual:
                return usual
        self.recent = [*self.recent, loss][-self._window :]
        return None


def read_skipped(run_dir: Path) -> frozenset[int]:
    """The steps that the run leaves out. Raises ConfigurationError if the file that holds them is damaged."""
    path = run_dir / SPIKES
    try:
        content: Any = parse_json(read_text(path))
        steps = content["skipped_steps"]
        if not all(isinstance(step, int) and step >= 0 for step in steps):
            raise ValueError("its steps are not whole numbers")
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}: {error}): remove it, and the run finds the steps again."
        ) from error
    return frozenset(steps)


def write_skipped(run_dir: Path, steps: frozenset[int]) -> None:
    """Keep the steps that the run leaves out. Raises OSError."""
    replace_file(run_dir / SPIKES, json.dumps({"skipped_steps": sorted(steps)}) + "\n")
