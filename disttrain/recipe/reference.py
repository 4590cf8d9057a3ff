"""How a recipe names a callable of the user's own: `package.module:callable`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import isclass, isroutine
from pathlib import Path
from types import ModuleType
from typing import Any

from disttrain.errors import ConfigurationError
from disttrain.recipe.model import Recipe
from disttrain.recipe.trust import HOOKS, KEYS_OF_CODE, names_code


def look_for_code(recipe: Recipe, keys: Sequence[str] = (*KEYS_OF_CODE, HOOKS)) -> None:
    """Have `import_callable` find what the recipe names at one of `keys` in the recipe's folder of code, too.

    To be called once the user's trust is certain (`ask_before_importing`). The folder comes last, so that a file in it
    cannot take an installed package's place; but before the current one, which is another at each start.

    Raises ConfigurationError if this program would take or has taken a module from elsewhere that the folder has, too.
    """
    folder, named = recipe.code, {key: name for key, name in names_code(recipe).items() if key in keys}
    if folder is None or not named:
        return
    if folder not in sys.path:
        sys.path.append(folder)
    for key, names in named.items():
        for reference in names.split(", "):
            _refuse_another(reference.partition(":")[0].partition(".")[0], folder, key)


def _refuse_another(name: str, folder: str, key: str) -> None:
    """What is installed comes first on purpose, but not what another recipe has brought, or the folder of a script."""
    own = PathFinder.find_spec(name, [folder])
    try:
        found = find_spec(name)
    except ValueError:  # the program itself, `__main__`
        return
    if own is None or own.origin is None or found is None or found.origin is None or _is_of_python(name):
        return
    if os.path.realpath(own.origin) != os.path.realpath(found.origin) and "-packages" not in found.origin:
        raise ConfigurationError(
            f"{key}: {name!r} is {found.origin} in this program, and the recipe's is {own.origin}: rename one, train "
            "in a process of its own, or set `code` to the folder of the one that is meant."
        )


def import_callable(reference: str, key: str) -> Callable[..., Any]:
    """Import `package.module:callable`, from the current folder too; `key` is the recipe's key that holds it.

    Also from the folder of code of a recipe, where `look_for_code` was called for it.

    Raises ConfigurationError, which names the key, if the module is missing or fails to import, or if it has no such
    callable.
    """
    module_name, _, path = reference.partition(":")
    if not module_name or not path:
        raise ConfigurationError(f"{key}: {reference!r} is not of the form package.module:callable.")
    if _is_of_python(module_name):
        raise _refusal(reference, key, module_name)
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that a file in the folder cannot take an installed package's place
    try:
        value: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigurationError(
                f"{key}: there is no module {error.name!r}; start in the folder that holds it, give that as "
                "`code` of the recipe, or install it."
            ) from error
        raise ConfigurationError(
            f"{key}: importing {module_name!r} failed: {error}; install what is missing."
        ) from error
    except SystemExit as leaving:
        raise ConfigurationError(
            f"{key}: importing {module_name!r} calls sys.exit({leaving.code!r}); put a script's own work under "
            "`if __name__ == '__main__':`."
        ) from leaving
    except Exception as error:  # a user's module may raise anything
        raise ConfigurationError(f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(value, name):
            names = [each for each in dir(value) if not each.startswith("_") and callable(getattr(value, each, None))]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the name after the colon."
            raise ConfigurationError(f"{key}: module {module_name!r} has no {path!r}; {hint}")
        value = getattr(value, name)
        if _is_of_python(origin := _origin(value)):
            raise _refusal(reference, key, origin)
    if not callable(value):
        raise ConfigurationError(f"{key}: {reference!r} is a {type(value).__name__}, not something that can be called.")
    result: Callable[..., Any] = value
    return result


def _origin(value: object) -> str:
    """The module that `value` is, or in which a function or class was defined; empty for other objects."""
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", "")) if isroutine(value) or isclass(value) else ""


def _is_of_python(module_name: str) -> bool:
    """Whether the module is of the standard library, where neither models nor data sets live.

    A typo, or a stranger's checkpoint that names `torch:os.system`. A safety net only: what a recipe names is code,
    and other packages have functions that run commands, too (docs/security.md).
    """
    return module_name.partition(".")[0] in sys.stdlib_module_names


def _refusal(reference: str, key: str, module_name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{key}: {reference!r} is part of Python's standard library ({module_name}), which holds neither models nor "
        "data sets; name your own, in a module with another name."
    )
