"""`-o key=value`: what the command line changes in a recipe."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Container, Sequence
from datetime import date, time
from typing import Any

from disttrain.errors import RecipeError, brief
from disttrain.recipe.address import is_text
from disttrain.recipe.explain import sections, unknown_key, wants_text
from disttrain.recipe.optimizers import OPTIONS_OF_ALL
from disttrain.recipe.renamed import RENAMED

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping with the overrides in it, and for each key they set the words that name it in a message.

    Raises:
        RecipeError: an override that is not `key=value`, or whose key goes through something that is not a table;
            overrides that are no list of them.
    """
    given: Any = overrides
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(one, str) for one in given):
        raise RecipeError(f"overrides: should be a list of texts, as in ['optim.lr=0.1'], not {brief(repr(given), 80)}")
    merged = _copy(mapping)
    places: dict[str, str] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not is_text(override):
            raise RecipeError(f"-o {key}: {override!r} is not UTF-8, and recipes are; give another name")
        if not equals:
            raise RecipeError(f"-o {override}: should be key=value, as in -o optim.lr=0.1")
        if not _KEY.fullmatch(key):
            raise RecipeError(f"-o {override}: {key!r} is not a key; write section.key=value, as in -o optim.lr=0.1")
        if key in sections():
            raise RecipeError(f"-o {key}: is a section; give one of its keys, as in -o optim.lr=0.1")
        if not text:
            raise RecipeError(f"-o {key}: has no value; write -o {key}=VALUE")
        key = RENAMED.get(key, key)
        value = text if wants_text(key) and not text.startswith(("'", '"')) else parse_value(text)
        if key == "optim.name":
            _leave_options_behind(merged, value, places)
        _set(merged, key, value)
        places[key] = f"-o {key}"
    return merged, places


def parse_value(text: str) -> Any:
    """A TOML value, or else the text itself, so that words need no quotes: `train.device=cpu`, `optim.lr=.1`."""
    if _NUMBER.fullmatch(text) and ("." in text or "e" in text.lower()):
        return float(text)  # TOML has neither .1 nor 1.
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also a number of thousands of digits, lists within lists without end
        return text
    value = parsed["value"]
    return text if len(parsed) > 1 or isinstance(value, date | time) else value


def _leave_options_behind(mapping: dict[str, Any], name: Any, given: Container[str]) -> None:
    """Options belong to their optimizer: naming another one drops the recipe's, but none that an override has given."""
    optim = mapping.get("optim", {})
    if isinstance(optim, dict) and optim.get("name", "sgd") != name:
        mapping["optim"] = {
            key: value for key, value in optim.items() if key in OPTIONS_OF_ALL or f"optim.{key}" in given
        }


def _copy(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in mapping.items()}


def _set(mapping: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if parents and parents[0] not in sections():
        raise RecipeError(f"-o {key}: {unknown_key(parents[:1])}")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise RecipeError(f"-o {key}: {parent} holds a value, so it has no key {last!r}")
    mapping[last] = value
