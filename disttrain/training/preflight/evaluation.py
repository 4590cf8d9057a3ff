"""A look at what a task makes of a score, before anything is trained: metrics, details and the headline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from disttrain.errors import DisttrainError, failure_of, is_in_user_code
from disttrain.task import Task, has_own
from disttrain.training.evaluate import checked_details, checked_metrics
from disttrain.training.preflight.task import check_metrics

_FAILED = object()
# What Python says of a call whose arguments do not fit.
_MISFIT = re.compile(r"positional argument|required keyword-only|unexpected keyword argument|multiple values for")


class _Watched(dict[str, Any]):
    """A dict that knows which keys were looked for in vain."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.missed: set[object] = set()

    def __missing__(self, key: object) -> Any:
        self.missed.add(key)
        raise KeyError(key)


def check_evaluation(task: Task, score: Mapping[str, Any], num_samples: int, wanted: str | None) -> None:
    """Try what the task makes of the score of a few samples. `wanted`: see `check_metrics`.

    Raises ConfigurationError for what may not be returned. Raises TaskError for what is raised if it would be for any
    number of samples: a name or an attribute that does not exist, arguments that do not fit, a key that no score has.
    Anything else may come of the samples being few, as of an area under a curve when all are of one class.
    """
    sums = _Watched(score)
    metrics = _tried(task, "metrics", lambda: task.metrics(sums, num_samples), sums)
    if metrics is not _FAILED:
        metrics = checked_metrics(task, metrics)
        check_metrics(task, metrics, wanted)
    details = _tried(task, "details", lambda: task.details(sums, num_samples), sums)
    if details is not _FAILED:
        details = checked_details(task, details)
    if metrics is _FAILED or details is _FAILED:
        return
    # Of the user's own, a metric or a detail may be left out for so few samples; without any, none is ever there.
    known = _Watched(metrics)
    never = [] if has_own(task, "metrics") else [known]
    _tried(task, "headline", lambda: task.headline(known, details), *never)
    none = _Watched({})
    without = "headline without details, as at the end of a run"
    _tried(task, without, lambda: task.headline(known, none), *never, none)


def _tried(task: Task, method: str, call: Callable[[], Any], *watched: _Watched) -> Any:
    """What the call returns, or `_FAILED`."""
    try:
        return call()
    except DisttrainError:
        raise
    except Exception as error:  # a user's task may raise anything
        if is_in_user_code(error) and _is_mistake(error, watched):
            raise failure_of(f"{type(task).__name__}.{method}", error) from error
        return _FAILED


def _is_mistake(error: Exception, watched: tuple[_Watched, ...]) -> bool:
    """Whether it would be raised for any number of samples."""
    match error:
        case UnboundLocalError():  # of what a loop sets, say, that had nothing to do
            return False
        case NameError() | ImportError():
            return True
        case AttributeError():
            return error.obj is not None  # None is what a search has not found
        case TypeError():
            return _MISFIT.search(str(error)) is not None
        case KeyError():
            return any(key in one.missed for one in watched for key in error.args)
    return False
