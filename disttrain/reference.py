"""How a recipe names a callable of the user's own: `package.module:callable`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from disttrain.errors import ConfigurationError


def import_callable(reference: str, key: str) -> Callable[..., Any]:
    """Import `package.module:callable`, from the current folder too; `key` is the recipe's key that holds it.

    Raises ConfigurationError, which names the key, if the module is missing or fails to import, or if it has no such
    callable.
    """
    module_name, _, path = reference.partition(":")
    if not module_name or not path:
        raise ConfigurationError(f"{key}: {reference!r} is not of the form package.module:callable.")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        # A recipe may come with a stranger's checkpoint: `os:system` is no data set.
        raise ConfigurationError(
            f"{key}: {reference!r} is of Python's standard library, where neither models nor data sets live; name your "
            "own."
        )
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that a file in the folder cannot take an installed package's place
    try:
        value: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigurationError(
                f"{key}: there is no module {error.name!r}; start in the folder that holds it, or install it."
            ) from error
        raise ConfigurationError(
            f"{key}: importing {module_name!r} failed: {error}; install what is missing."
        ) from error
    except SystemExit as leaving:
        raise ConfigurationError(
            f"{key}: importing {module_name!r} calls sys.exit({leaving.code!r}); a script's own work belongs under "
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
    if not callable(value):
        raise ConfigurationError(f"{key}: {reference!r} is a {type(value).__name__}, not something that can be called.")
    result: Callable[..., Any] = value
    return result
