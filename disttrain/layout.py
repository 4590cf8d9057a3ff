"""What the checkpoints of a run are called, and which there are: for those who only look, without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from disttrain.files import parse_json, read_text

MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
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


def accuracy_of(path: Path) -> float | None:
    """The accuracy that was measured at this checkpoint, if any was."""
    try:
        accuracy = parse_json(read_text(path / STATE))["metrics"]["eval/accuracy"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return accuracy if isinstance(accuracy, float) else None
