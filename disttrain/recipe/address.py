"""Addresses: recipes and runs live in folders, or behind any URL that fsspec can open (s3://, gs://, az://, …)."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disttrain.errors import ConfigurationError
from disttrain.recipe.home import home_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_PASSWORD = re.compile(r"^(https?://[^/]*@|[^/]*://[^/@]*:[^/@]+@)", re.IGNORECASE)


def is_url(address: object) -> bool:
    """Whether this is a URL and not a path."""
    return isinstance(address, str) and _URL.match(address) is not None


def settled(address: str) -> str:
    """The address as it holds wherever this process goes: a path is absolute, with the home folder for `~`; URLs stand.

    Raises ConfigurationError if the current folder has been removed, or the home folder is unknown.
    """
    if is_url(address):
        return address
    try:
        return str(expanded(address).absolute())
    except FileNotFoundError:
        raise ConfigurationError(
            f"{address}: the current folder has been removed; start in one that exists, or give an absolute path."
        ) from None


def expanded(path: str) -> Path:
    """The path, with the home folder for `~`. Raises ConfigurationError if that is unknown."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigurationError(
            f"{path}: that home folder is unknown (HOME is not set, or there is no such user); give an "
            f"absolute path, or ./{path} for a folder of that name."
        )
    return Path(found)


def is_text(name: str) -> bool:
    """Whether a name from the command line or a folder can be written as UTF-8, as recipes and manifests are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """What opens the URL, and the path there, without a slash at its end.

    Raises ConfigurationError if nothing installed can open it, or if it holds a password.
    """
    from fsspec.core import url_to_fs

    if _PASSWORD.match(url):
        raise ConfigurationError(
            f"{url.partition('://')[0]}://…: holds a password or a token, and addresses are stored and logged; leave "
            "it to the environment or to the configuration of the library that opens it."
        )
    try:
        urlsplit(url)  # some libraries notice only at the first request that it is not a URL
        opened, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigurationError(f"{url}: {error}: it is a separate package; install it with pip.") from error
    except ValueError as error:
        raise ConfigurationError(
            f"{url}: {error}. A run lives in a folder, or behind a URL that fsspec can open: s3://, gs://, az://, …"
        ) from error
    return opened, str(path).rstrip("/")


def read_url(url: str) -> bytes:
    """What is behind a URL. Raises OSError, ConfigurationError if nothing installed can open it."""
    files, path = file_system(url)
    try:
        return bytes(files.cat_file(path))
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such object") from None
    except OSError:
        raise
    except Exception as error:  # each library has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def working_folder(url: str) -> Path:
    """The folder on this machine in which the run behind `url` is worked on.

    It is below $DISTTRAIN_SCRATCH, or else below the user's cache folder. Runs behind one parent are neighbours in it.
    """
    scratch, cache = os.environ.get("DISTTRAIN_SCRATCH"), os.environ.get("XDG_CACHE_HOME")
    root = Path(scratch or Path(cache or home_folder() / ".cache", "disttrain", "runs"))
    parent, _, name = url.rstrip("/").rpartition("/")
    return (
        root
        / hashlib.sha256(os.fsencode(parent)).hexdigest()[:12]
        / (re.sub(r"[^\w.-]+", "-", name).strip(".") or "run")
    )
