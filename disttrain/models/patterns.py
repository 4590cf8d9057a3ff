"""Parameters by patterns of their names, as a recipe gives them: `layer1.*`, `*.bias`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from disttrain.errors import ConfigurationError
from disttrain.recipe.names import nearest

_MOST_NAMED = 4


def matching(patterns: Sequence[str], names: Iterable[str], key: str, *, what: str = "parameter") -> list[str]:
    """Those of `names` that match one of the patterns, in their order.

    Raises ConfigurationError, which names the recipe's `key`, for a pattern that matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(f"{key}: no {what} matches {pattern!r}{_hint(pattern, names)}")
    return [name for name in names if matches(name, patterns)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _hint(pattern: str, names: list[str]) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; did you mean '{pattern}.*'?"
    whole_modules = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names if "." in name)
    near = nearest(pattern, [*names, *whole_modules])
    return f"; did you mean '{near}'?" if near else f"; there are {listed(names) or 'none'}."
