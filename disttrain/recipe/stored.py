"""The recipe of a run: its recipe.toml, or that of its newest checkpoint, where the file is lost or damaged.

A checkpoint's manifest vouches for its state.json, and that holds the recipe. Read without torch, which launchers lack.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disttrain.errors import RecipeError
from disttrain.files import parse_json, read_bytes, read_text
from disttrain.layout import CHECKPOINTS, MANIFEST, RECIPE, STATE, checkpoints_in
from disttrain.recipe.address import is_url
from disttrain.recipe.explain import sections
from disttrain.recipe.load import load_recipe, parse_recipe
from disttrain.recipe.model import Recipe
from disttrain.recipe.trust import is_own_recipe


def load_recipe_for(name_or_path: str, run_dir: Path | str | None, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe`; of the run in `run_dir`, if its own recipe.toml is named, whatever has become of that file.

    Raises RecipeError, as `load_recipe` does.
    """
    is_own = is_own_recipe(name_or_path, run_dir)
    if is_own and run_dir is not None and not is_url(str(run_dir)):
        found = recipe_of_checkpoints(Path(run_dir))
        if found is not None and damage(Path(run_dir)) is not None:
            checkpoint, recipe = found
            return parse_recipe(recipe.model_dump(mode="json"), overrides, source=f"{checkpoint}/{STATE}")
    return load_recipe(name_or_path, overrides, of_run=is_own)


def damage(run: Path) -> str | None:
    """What is wrong with the run's recipe.toml ("is lost"); None if it is whole. We write one with every section."""
    try:
        mapping = tomllib.loads(read_text(run / RECIPE))
        parse_recipe(mapping)
    except FileNotFoundError:
        return "is lost"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError, RecipeError):
        return "is damaged"
    missing = _cut_off([name in mapping for name in sections()])
    return f"is cut off (it has no section {sections()[missing]})" if missing is not None else None


def _cut_off(present: Sequence[bool]) -> int | None:
    """From which section on none is there. One that is missing between others is newer than the run."""
    return None if present[-1] else max((index + 1 for index, there in enumerate(present) if there), default=0)


def recipe_of_checkpoints(run: Path) -> tuple[Path, Recipe] | None:
    """The newest checkpoint whose manifest vouches for its state, and the recipe in that; None if there is none."""
    for path in reversed(_checkpoints(run)):
        try:
            state = _vouched_state(path)
            return path, parse_recipe(state["recipe"], source=f"{path}/{STATE}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RecipeError):
            continue  # reading the whole checkpoint reports what is wrong with it
    return None


def _checkpoints(run: Path) -> list[Path]:
    try:
        return checkpoints_in(run / CHECKPOINTS)
    except (OSError, ValueError):  # a folder that cannot be looked into, a name that no folder can have
        return []


def _vouched_state(checkpoint: Path) -> Mapping[str, Any]:
    raw = read_bytes(checkpoint / STATE)
    expected = parse_json(read_bytes(checkpoint / MANIFEST))["files"][STATE]
    if expected != {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}:
        raise ValueError("not what was written")
    state: dict[str, Any] = parse_json(raw)
    return state
