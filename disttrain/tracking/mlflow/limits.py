"""What MLflow takes: characters of names, lengths of values, sizes of batches (mlflow.utils.validation)."""

from __future__ import annotations

import posixpath
import re
from typing import Any

MAX_PARAMS = 100  # in one request
MAX_TAGS = 100  # in one request
MAX_METRICS = 1000  # in one request
LONG_VALUE = 6000  # characters of a parameter; 500 before MLflow 2.10
MAX_VALUE = 5000  # characters of a tag; MLflow 3 takes 8000, older servers 5000
_MAX_KEY = 250
_NOT_ALLOWED = re.compile(r"[^\w.\- /]")  # a colon is refused by servers on Windows


def metric_key(name: str) -> str:
    """The name under which MLflow takes a metric, parameter or tag: forbidden characters become `_`."""
    key = _NOT_ALLOWED.sub("_", name)
    # MLflow treats names as paths, and takes only those that are written in their shortest form inside their folder.
    key = posixpath.normpath(key).lstrip("/")
    while key.startswith(".."):
        key = key.removeprefix("..").lstrip("/")
    return key[:_MAX_KEY].rstrip("/") if key not in ("", ".") else "_"


def shorten(value: Any, limit: int) -> str:
    """`value` as text of at most `limit` characters, all of which can be sent: a file's name need not be UTF-8."""
    text = str(value).encode(errors="replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"
