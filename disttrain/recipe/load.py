"""Find a recipe, read it and check it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from disttrain.errors import RecipeError
from disttrain.layout import RECIPE
from disttrain.recipe.address import expanded, is_text, is_url, read_url, settled
from disttrain.recipe.bounds import beyond_bounds
from disttrain.recipe.explain import explain, place
from disttrain.recipe.model import Recipe
from disttrain.recipe.names import did_you_mean
from disttrain.recipe.once import kept
from disttrain.recipe.overrides import apply_overrides
from disttrain.recipe.renamed import mentions_of_old_names, with_current_names
from disttrain.recipe.text import decoded
from disttrain.recipe.trust import names_code

_SHIPPED = Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: name to description, which is the file's first comment line."""
    return {path.stem: _description(path) for path in sorted(_SHIPPED.glob("*.toml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, of_run: bool = False) -> Recipe:
    """The recipe of that name (a shipped one), path or URL, with the overrides (`section.key=value`) in it.

    Code that a file names is looked for in the file's folder, unless its key `code` names another (relative to that).
    Not so in a recipe that a run has stored (`of_run`): it has the folder, or is from before there was one.

    Raises:
        RecipeError: no such recipe, not TOML, or wrong keys or values; one line per mistake.
    """
    is_file = not is_url(name_or_path) and kept(name_or_path) is None
    path = _find(name_or_path) if is_file else Path(name_or_path)
    source = name_or_path if path.parent != _SHIPPED else f"recipe {path.stem!r}"
    try:
        mapping = tomllib.loads(recipe_text(name_or_path))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: not valid TOML: {error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not a recipe: recipes are TOML, text in UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists without end
        raise RecipeError(f"{source}: not a recipe: {error}") from None
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror or error}") from None
    mapping.setdefault("name", re.sub(r"[^\w.-]+", "-", path.stem))
    if not is_file or path.parent == _SHIPPED or of_run:
        return parse_recipe(mapping, overrides, source=source)
    if isinstance(code := mapping.get("code"), str) and "\0" not in code:
        mapping["code"] = str(Path(settled(str(path.parent / expanded(code)))).resolve())
    recipe = parse_recipe(mapping, overrides, source=source)
    folder = str(Path(settled(str(path.parent))).resolve())
    if recipe.code is None and names_code(recipe) and is_text(folder):  # or no run could store it
        recipe = recipe.model_copy(update={"code": folder})
    return recipe


def as_recipe(recipe: Any, overrides: Sequence[str] = ()) -> Recipe:
    """What a program gives as its recipe, with the overrides in it: a Recipe, a mapping of sections, a name or a path.

    Raises RecipeError.
    """
    if isinstance(recipe, Recipe):
        return recipe if not overrides else parse_recipe(recipe.model_dump(mode="json"), overrides)
    if isinstance(recipe, Mapping):
        return parse_recipe(recipe, overrides)
    if isinstance(recipe, str | os.PathLike):
        return load_recipe(os.fspath(recipe), overrides)
    kind = type(recipe).__name__
    raise RecipeError(f"a {kind} is not a recipe; give a Recipe, a mapping of its sections, a name or a path")


def parse_recipe(mapping: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """The recipe that a mapping of sections describes; `source` names it in messages.

    Raises:
        RecipeError: wrong keys or values; one line per mistake.
    """
    try:
        return _parsed(mapping, overrides, source)
    except RecursionError:
        raise RecipeError(f"{source}: is nested too deeply") from None


def _parsed(mapping: Mapping[str, Any], overrides: Sequence[str], source: str) -> Recipe:
    merged, places = apply_overrides(with_current_names(dict(mapping)), overrides)
    if absurd := [f"{place(path, source, places)}: {what}" for path, what in beyond_bounds(merged)]:
        raise RecipeError("\n".join(dict.fromkeys(absurd)))
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(explain(error, source, places)) from None


def old_names_in(recipe: Any, overrides: Sequence[str]) -> list[str]:
    """A line for each key that a valid recipe, in any form of `as_recipe`, or an override calls by its old name."""
    if isinstance(recipe, str | os.PathLike):
        recipe = tomllib.loads(recipe_text(os.fspath(recipe)))
    return mentions_of_old_names(recipe if isinstance(recipe, Mapping) else {}, overrides)


def recipe_text(name_or_path: str) -> str:
    """The text of a recipe that `load_recipe` takes, as it stands, for callers that send it elsewhere."""
    content = kept(name_or_path)
    if content is None:
        content = read_url(name_or_path) if is_url(name_or_path) else _find(name_or_path).read_bytes()
    return decoded(content)


def _find(name_or_path: str) -> Path:
    looks_like_path = "/" in name_or_path or name_or_path.endswith(".toml")
    shipped = shipped_recipes()
    if not looks_like_path and name_or_path in shipped:
        return _SHIPPED / f"{name_or_path}.toml"
    path = Path(name_or_path)
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder without permission to look into it
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{_cut(name_or_path)}: cannot be read: {reason}") from None
    if path.is_dir():
        if (path / RECIPE).is_file():
            raise RecipeError(f"{name_or_path} is a run directory, not a recipe; its recipe is {path / RECIPE}")
        raise RecipeError(f"{name_or_path} is a folder, not a recipe; give a TOML file or one of {', '.join(shipped)}")
    if path.exists():
        return path
    if looks_like_path:
        raise RecipeError(f"{name_or_path}: no such file; give a TOML file or one of {', '.join(shipped)}")
    if Path(f"{name_or_path}.toml").is_file():
        raise RecipeError(f"no recipe {name_or_path!r}; did you mean {name_or_path}.toml?")
    raise RecipeError(
        f"no recipe {name_or_path!r}: it is neither a file nor one of {', '.join(shipped)}"
        + did_you_mean(name_or_path, shipped)
    )


def _cut(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:100]}…"


def _description(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
