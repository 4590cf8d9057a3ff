"""What a task's own methods raise, in a line that names the method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from disttrain.errors import DisttrainError, failure_of, is_in_user_code
from disttrain.task.base import Task


@contextmanager
def named(task: Task, method: str, *but: type[Exception]) -> Iterator[None]:
    """Around a call of the task's `method`. Raises TaskError for what it raises, but for what is ours or among `but`.

    What passed through no code of the user's is a bug of ours, and keeps its traceback.
    """
    kept: tuple[type[Exception], ...] = (DisttrainError, *but)
    try:
        yield
    except kept:
        raise
    except Exception as error:  # a user's task may raise anything
        if not is_in_user_code(error):
            raise
        raise failure_of(f"{type(task).__name__}.{method}", error) from error
