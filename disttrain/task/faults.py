"""What a task's own methods raise, in a line that names the method."""

from __future__ import annotations

from contextlib import AbstractContextManager

from disttrain.errors import FailuresNamedAt, failures_named
from disttrain.task.base import Task


def named(task: Task, method: str, *but: type[Exception]) -> AbstractContextManager[None]:
    """See `failures_named`: around a call of the task's `method`."""
    return failures_named(f"{type(task).__name__}.{method}", *but)


def named_at(task: Task, method: str, place: str) -> AbstractContextManager[None]:
    """See `FailuresNamedAt`: around a call of the task's `method` in training."""
    return FailuresNamedAt(f"{type(task).__name__}.{method}", place)
