"""Whether there is anything left to do for a node: a successor, or one that comes late, may find the run finished."""

from __future__ import annotations

import json
from pathlib import Path

from disttrain.errors import DisttrainError
from disttrain.files import read_bytes
from disttrain.recipe import load_recipe
from disttrain.recipe.address import is_url
from disttrain.remote import RemoteRun
from disttrain.rundir import JOURNAL, RECIPE

Length = tuple[int, int | None]
"""How long a run is to be: train.epochs and train.max_steps, which may be more than when it was started before."""


def is_finished(run: str, length: Length) -> bool:
    """Whether the run in a folder or behind a URL was trained to such a length; False where that cannot be seen."""
    try:
        if is_url(run):
            lines = RemoteRun(run).read_journal().splitlines()
        else:
            lines = read_bytes(Path(run) / JOURNAL).splitlines()
        if _last_status(lines) != "FINISHED":
            return False
        train = load_recipe(f"{run.rstrip('/')}/{RECIPE}").train
    except (OSError, DisttrainError):
        return False
    return (train.epochs, train.max_steps) == length


def _last_status(lines: list[bytes]) -> str | None:
    """The journal's last word on how the run stands."""
    for line in reversed(lines):
        if b'"status"' in line:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("kind") == "status":
                return str(record.get("status"))
    return None
