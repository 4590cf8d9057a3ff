"""The checkpoints of one run: find the newest good one, set damaged ones aside, retire old ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disttrain.checkpoint.folder import STATE, Checkpoint, Tensors, read_checkpoint, write_checkpoint
from disttrain.errors import ConfigurationError
from disttrain.faultpoints import reached

_NAME = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """A run's folder of checkpoints. One process writes to it; any may read."""

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1) -> None:
        self.folder = folder
        self._keep_last = max(1, keep_last)
        self._keep_best = keep_best

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `state["step"]`, then retire those that are no longer needed. Raises OSError."""
        path = self.folder / f"step-{state['step']:08d}"
        if path.exists():
            # The same step again, with more known about it (an evaluation): the new one replaces the old.
            aside = self.folder / f".{path.name}.replaced"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            reached("checkpoint: set aside", step=state["step"])
            try:
                write_checkpoint(path, model, optimizer, state)
            except BaseException:
                aside.rename(path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            write_checkpoint(path, model, optimizer, state)
        self._retire()
        return path

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest good checkpoint, or None. Damaged ones are renamed aside, and `warn` is told their names."""
        oldest_first = self.paths()
        for path in reversed(oldest_first):
            try:
                return read_checkpoint(path)
            except ConfigurationError as error:
                aside = _free_name(path.with_name(f"{path.name}.damaged"))
                path.rename(aside)
                others = path != oldest_first[0]
                what = "the checkpoint before it is used" if others else "no other is left, so training begins anew"
                warn(f"{error} Set aside as {aside.name}; {what}.")
        return None

    def clear_unfinished(self) -> None:
        """Remove what a killed writer left under a temporary name."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob(".step-*.replaced"):
            original = self.folder / path.name.removeprefix(".").removesuffix(".replaced")
            if original.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(original)
        for leftover in ("writing", "retired"):
            for path in self.folder.glob(f".step-*.{leftover}"):
                shutil.rmtree(path, ignore_errors=True)

    def _retire(self) -> None:
        paths = self.paths()
        keep = set(paths[-self._keep_last :])
        scored = [(score, step_of(path), path) for path in paths if (score := accuracy_of(path)) is not None]
        keep.update(path for _, _, path in sorted(scored, reverse=True)[: self._keep_best])
        for path in paths:
            if path not in keep:
                # Renamed first: a kill in the middle of the removal must not leave what looks like a damaged one.
                retired = path.rename(path.with_name(f".{path.name}.retired"))
                reached("checkpoint: retired")
                shutil.rmtree(retired, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def accuracy_of(path: Path) -> float | None:
    """The accuracy that was measured at this checkpoint, if any was."""
    try:
        accuracy = json.loads((path / STATE).read_text(encoding="utf-8"))["metrics"]["eval/accuracy"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return accuracy if isinstance(accuracy, float) else None


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
