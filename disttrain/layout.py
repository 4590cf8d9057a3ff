"""What the checkpoints of a run are called, and which there are: for those who only look, without torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.files import parse_json, read_text

MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
EVAL = "eval/"
"""What the names of metrics of evaluations begin with, in journals and checkpoints."""
CONTENTS = (MODEL, OPTIMIZER, STATE)
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints there are in a run's folder of them, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint's folder, whole or not."""
    return any(os.path.isfile(path / name) for name in (MANIFEST, MODEL))  # False also for impossible names


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def metrics_of(path: Path) -> dict[str, float]:
    """What was measured at this checkpoint, by name; nothing if nothing was, or if it cannot be read."""
    try:
        return metrics_in(parse_json(read_text(path / STATE)))
    except (OSError, ValueError):
        return {}


def metrics_in(state: Any) -> dict[str, float]:
    """What a checkpoint's state says was measured, whatever may stand in it: "accuracy", not "eval/accuracy"."""
    metrics = state.get("metrics") if isinstance(state, dict) else None
    if not isinstance(metrics, dict):
        return {}
    return {
        name.removeprefix(EVAL): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023
    }


@dataclass(frozen=True)
class Best:
    """The metric by which a checkpoint is better than another, and which end of it is: "min" or "max"."""

    metric: str = "accuracy"
    mode: str = "max"

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """A number that is larger the better the metrics are; None if this one is not there, or not finite."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "max" else -value

    def __str__(self) -> str:
        return f"{self.metric}:{self.mode}"


def best_in(state: Any) -> Best:
    """What decides in the run of this state; in one of before there was a choice, the accuracy."""
    found = state.get("best") if isinstance(state, dict) else None
    if not isinstance(found, dict) or found.keys() != {"metric", "mode"}:
        return Best()
    return Best(str(found["metric"]), str(found["mode"]))
