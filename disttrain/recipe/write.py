"""A recipe as TOML and as a JSON schema."""

from __future__ import annotations

import json
import math
import re
from datetime import date, time
from typing import Any

from disttrain.recipe.explain import sections
from disttrain.recipe.model import Recipe

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(recipe: Recipe, *, comments: bool = False) -> str:
    """Every key of the recipe with its value; reading it back gives the same recipe. Keys that are None are left out.

    Args:
        recipe: what to write.
        comments: write above each key what it means, and the keys that are left out as comments.
    """
    lines = [f"name = {_value(recipe.name)}"]
    if recipe.code is not None:
        lines += [f"# {Recipe.model_fields['code'].description}"] * comments + [f"code = {_value(recipe.code)}"]
    for name in sections():
        section = getattr(recipe, name)
        lines += ["", f"[{name}]"]
        for key, value in section.model_dump().items():
            field = type(section).model_fields.get(key)
            if comments and field is not None:
                lines.append(f"# {field.description}")
            if value is not None:
                lines.append(f"{_key(key)} = {_value(value)}")
            elif comments:
                lines.append(f"# {_key(key)} =")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with which editors complete and check."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "disttrain recipe"}


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # JSON's strings are TOML's basic strings, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items() if item is not None)}}}"
    if isinstance(value, date | time):
        return value.isoformat()
    raise ValueError(f"a recipe cannot hold a {type(value).__name__}: {value!r}")
