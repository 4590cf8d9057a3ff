"""Find the checkpoint that a user means by the path or URL of a run, or of a checkpoint."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from disttrain.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from disttrain.errors import ConfigurationError, UsageError, brief, printable
from disttrain.layout import CHECKPOINTS, MANIFEST, RECIPE, is_checkpoint
from disttrain.recipe.address import is_url
from disttrain.remote.copy import local_copy
from disttrain.runs.rundir import is_run


def find_checkpoint(address: str | Path, *, raw: bool = True) -> Checkpoint:
    """The checkpoint at a path or URL, or the newest good one of the run there.

    Unless `raw`, its weights are their averages, if the run keeps any (`train.ema_decay`): what it evaluates. Raises
    UsageError if there is neither, ConfigurationError if it, or all of the run, is damaged. Changes nothing on disk.
    """
    with local_copy(str(address), checkpoints="newest") as path:
        found = _find(path)
        if is_url(address):
            found = replace(found, path=str(found.path).replace(str(path), str(address).rstrip("/")))
        return found if raw else found.averaged()


def _find(path: Path) -> Checkpoint:
    if is_checkpoint(path):
        return read_checkpoint(path)
    if not is_run(path):
        raise UsageError(_what_is_wrong_with(path))
    oldest_first = CheckpointStore(path / CHECKPOINTS).paths()
    for candidate in reversed(oldest_first):
        try:
            return read_checkpoint(candidate)
        except ConfigurationError as error:
            if candidate == oldest_first[0]:
                raise
            print(printable(f"warning: {error} The previous checkpoint is used."), file=sys.stderr)
    raise UsageError(f"{path} has no good checkpoint yet.")


def _what_is_wrong_with(path: Path) -> str:
    if not os.path.exists(path):
        return f"{brief(path)} does not exist: give a run directory (see `disttrain runs list`) or a checkpoint in it."
    return f"{path} is neither a run directory (no {RECIPE}) nor a checkpoint (no {MANIFEST})."
