"""What a task's own methods raise, in a line that names the method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from disttrain.errors import DisttrainError, failure_in
from disttrain.task.base import Task


@contextmanager
def named(task: Task, method: str) -> Iterator[None]:
    """Around a call of the task's `method`. Raises UserCodeError for what it raises, unless that speaks for itself."""
    try:
        yield
    except DisttrainError:
        raise
    except Exception as error:  # a user's task may raise anything
        raise failure_in(f"{type(task).__name__}.{method}", error) from error
