"""Options of a task's `predict`, from a command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from disttrain.errors import UsageError
from disttrain.recipe.names import did_you_mean
from disttrain.task import Task


def predict_options(task: Task, words: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments that `name=value` words mean; a value is JSON, or text.

    Raises UsageError for one that the task's `predict` does not have.
    """
    parameters = inspect.signature(task.predict).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            hint = did_you_mean(name, known) or f"; {there_are}"
            raise UsageError(f"-o {word}: {type(task).__name__}.predict has no such option{hint}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
