"""Whether there is anything left to do for a node: a successor, or one that joins late, may find the run finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import DisttrainError
from disttrain.files import parse_json, read_bytes
from disttrain.layout import JOURNAL, RECIPE
from disttrain.recipe import Recipe, load_recipe, load_recipe_for, recipe_of_checkpoints
from disttrain.recipe.address import is_url
from disttrain.runs.rundir import refuse_other_recipe


def is_finished(run: str, source: str, overrides: Sequence[str]) -> bool:
    """Whether the run in a folder or behind a URL has been trained as the recipe asks; False where it cannot be seen.

    Raises ConfigurationError if it is finished, and another recipe's.
    """
    trained_with = _recipe_of_finished(run)
    if trained_with is None:
        return False
    recipe = load_recipe_for(source, run, overrides)
    refuse_other_recipe(run, trained_with, recipe, "give the same recipe to resume it")
    before, now = trained_with.train, recipe.train
    return (before.epochs, before.max_steps) == (now.epochs, now.max_steps)  # else there is more to do


def _recipe_of_finished(run: str) -> Recipe | None:
    try:
        if is_url(run):
            from disttrain.remote import RemoteRun  # not above: it imports torch, and launchers do without

            lines = RemoteRun(run).read_journal().splitlines()
        else:
            lines = read_bytes(Path(run) / JOURNAL).splitlines()
        if _last_status(lines) != "FINISHED":
            return None
        found = None if is_url(run) else recipe_of_checkpoints(Path(run))
        return found[1] if found is not None else load_recipe(f"{run.rstrip('/')}/{RECIPE}", of_run=True)
    except (OSError, DisttrainError):
        return None


def _last_status(lines: list[bytes]) -> str | None:
    """The journal's latest status of the run."""
    for line in reversed(lines):
        if b'"status"' in line:
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("kind") == "status":
                return str(record.get("status"))
    return None
