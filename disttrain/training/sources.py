"""What a worker computes with: digests of its recipe and of the code that it has loaded, to compare with others'.

Workers on other machines may read another copy of a file, and one that comes later may read it after it was edited. In
exact mode nothing else would show that they compute something else.
"""

from __future__ import annotations

import json
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

from disttrain.recipe import Recipe
from disttrain.runs.rundir import flatten, is_of_a_machine

_RECIPE = "the recipe"
_COMPUTES = ("torch", "numpy", "torchvision")  # of what is installed, besides what the recipe names
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(),
    site.getusersitepackages(),
)


def sources_of(recipe: Recipe) -> dict[str, str]:
    """Digests of the recipe, of each module that is loaded and not installed or that the recipe names, and versions.

    Of what machines may have for themselves, nothing counts.
    """
    fields = recipe.model_dump(mode="json")
    same = {key: value for key, value in flatten(fields).items() if not is_of_a_machine(key)}
    found = {_RECIPE: _digest(json.dumps(same, sort_keys=True, default=str).encode())}
    named = set(_packages_in(fields))
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        attributes = getattr(module, "__dict__", {})
        if name in _COMPUTES:
            found[name] = str(attributes.get("__version__"))
        file = attributes.get("__file__")
        if not isinstance(file, str) or not file.endswith(".py") or name == "__main__":
            continue
        if package in named or not file.startswith(_INSTALLED):
            loader: Any = attributes.get("__loader__")  # for it knows how to read a module in a zip archive
            with suppress(OSError, AttributeError):
                found[name] = _digest(loader.get_data(file))
    return found


def why_unlike(sources: Sequence[Mapping[str, str]]) -> str | None:
    """What of a worker's differs from the first one's, in words; None if nothing that both have does.

    Versions do not count: the environment's fingerprint has them.
    """
    first, *others = sources
    for rank, other in enumerate(others, 1):
        both = (first.keys() & other.keys()).difference(_COMPUTES)
        if names := sorted(name for name in both if first[name] != other[name]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{names[0]}{more} of rank {rank} differ{'' if more else 's'} from that of rank 0"
    return None


def _packages_in(value: Any) -> Iterable[str]:
    """The packages of what a recipe names as package.module:callable."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _packages_in(one)
    elif isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value):
        yield value.partition(":")[0].partition(".")[0]


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:12]
