"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]


def _none_if_said(value: Any) -> Any:
    return None if value == "none" else value


NoneIfSaid = BeforeValidator(_none_if_said)
"""TOML has no null: the word "none" unsets a value that a recipe sets."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Patterns of names as a shell has them (`*`, `?`, `[abc]`); one alone may stand without its list."""


class Section(BaseModel):
    """A frozen part of a recipe. Types are strict: 1.5 is not a count, "yes" is not a boolean, NaN is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)
