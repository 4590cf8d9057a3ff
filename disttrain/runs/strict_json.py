"""JSON that every parser reads: it has no notation for NaN and the infinities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def strict_json(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
    """`value` with its keys as text, its tuples as lists, and for every NaN and infinite float what `instead` gives."""
    if isinstance(value, float):
        return value if math.isfinite(value) else instead(value)
    if isinstance(value, Mapping):
        return {str(key): strict_json(one, instead) for key, one in value.items()}
    return [strict_json(one, instead) for one in value] if isinstance(value, list | tuple) else value


def as_text(number: float) -> str:
    """A number that is not finite, as Python's `float` reads it and JSON would write it if it could."""
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
