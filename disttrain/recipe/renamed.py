"""Keys that recipes of older versions have under another name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = {"parallel.shards": "parallel.slices"}


def mentions_of_old_names(mapping: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """A line for each renamed key that a recipe or the command line calls by its old name."""
    given = {override.partition("=")[0].strip() for override in overrides}
    for section, keys in mapping.items():
        given.update(f"{section}.{key}" for key in (keys if isinstance(keys, Mapping) else ()))
    return [f"{old} is called {new} now; the old name still works" for old, new in RENAMED.items() if old in given]


def with_current_names(mapping: dict[str, Any]) -> dict[str, Any]:
    """The mapping with each renamed key under its name of today, unless that is there as well."""
    for old, new in RENAMED.items():
        section, old_key = old.split(".")
        new_key = new.split(".")[1]
        keys = mapping.get(section)
        if isinstance(keys, dict) and old_key in keys and new_key not in keys:
            renamed = {new_key if key == old_key else key: value for key, value in keys.items()}
            mapping = {**mapping, section: renamed}
    return mapping
