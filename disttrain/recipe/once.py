"""A recipe that can be read only once: a pipe, standard input. Its reader passes it on to its child processes."""

from __future__ import annotations

import os
import stat

from disttrain.errors import RecipeError
from disttrain.recipe.address import is_url
from disttrain.recipe.text import decoded

VARIABLE = "DISTTRAIN_RECIPE"
"""The environment variable that holds such a recipe: a line with its name, and its text."""
# The kernel takes 128 KiB for a variable.
_LONGEST = 100_000


def read_once(name_or_path: str) -> None:
    """Read what cannot be read again, or not by another process, and leave it in the environment.

    Everything else is left alone, what is not there, too. Raises RecipeError if it cannot be a recipe.
    """
    if is_kept(name_or_path):
        return  # the process that started this one has read it
    os.environ.pop(VARIABLE, None)
    if is_url(name_or_path) or not _is_fleeting(name_or_path):
        return
    try:
        with open(name_or_path, "rb") as file:
            text = decoded(file.read(_LONGEST + 1))
    except UnicodeDecodeError:
        raise RecipeError(f"{name_or_path}: not a recipe: recipes are TOML, text in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{name_or_path}: cannot be read: {error.strerror or error}") from None
    if len(text.encode()) > _LONGEST or "\0" in text:
        raise RecipeError(
            f"{name_or_path}: not a recipe, or one of more than {_LONGEST:,} bytes, which has to be in a file"
        )
    os.environ[VARIABLE] = f"{name_or_path}\n{text}"


def kept(name_or_path: str) -> bytes | None:
    """The text that this process, or the one that started it, has read there; None if there is none."""
    source, found, text = os.environ.get(VARIABLE, "").partition("\n")
    return text.encode(errors="surrogateescape") if found and source == name_or_path else None


def variables() -> dict[str, str]:
    """What a process that is started elsewhere needs in its environment for it."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def is_kept(name_or_path: str) -> bool:
    """Whether it was read once and for all."""
    return kept(name_or_path) is not None


def _is_fleeting(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    # Of each process another one, also where it is a file.
    is_of_this_process = os.path.abspath(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/"))
    return not stat.S_ISDIR(mode) and (is_of_this_process or not stat.S_ISREG(mode))
