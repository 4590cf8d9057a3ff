"""Tests with Hypothesis's `@given` in workers: each rank draws the same examples, and the first failure ends the test.

Hypothesis runs in every worker by itself. So what decides its course has to be the same everywhere: the seed, and no
database, deadline or measure of speed. Once an example fails in one rank, the others are in the middle of it or beyond:
from then on nothing can be run again, neither to shrink the example nor to print it. So it is shown as it was drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import SkipTest

import pytest

_OF_THE_RANK = ("rank", "world_size", "cluster")  # fixtures that are the same for every example


class _FirstFailure(BaseException):
    """Takes a failing example past Hypothesis, which would run it again."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def uses_hypothesis(item: pytest.Function) -> bool:
    """Whether the test function has `@given`."""
    return "hypothesis" in sys.modules and hasattr(item.obj, "hypothesis")


def leave_to_workers(item: pytest.Function) -> None:
    """At home: have Hypothesis's plugin not look at the fixtures, which exist in the workers only."""
    if uses_hypothesis(item):
        from hypothesis import HealthCheck

        _change(item, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors)


def agree(item: pytest.Function) -> None:
    """In a worker: make Hypothesis take the same course in every rank."""
    if not uses_hypothesis(item):
        return
    from hypothesis import HealthCheck, Phase

    settings = _settings(item)
    same: dict[str, Any] = {
        "database": None,
        "deadline": None,
        "phases": [phase for phase in settings.phases if phase in (Phase.explicit, Phase.generate, Phase.target)],
        "derandomize": item.config.getoption("--hypothesis-seed", None) is None,
    }
    checks = [HealthCheck.too_slow]
    manager: Any = item.session._fixturemanager
    own = [manager.getfixturedefs(name, item) for name in item._fixtureinfo.argnames if name not in _OF_THE_RANK]
    if not any(definitions and definitions[-1].scope == "function" for definitions in own):
        checks.append(HealthCheck.function_scoped_fixture)
    _change(item, *checks, **same)
    handle: Any = item.obj.hypothesis
    handle.inner_test = _ends_at_once(handle.inner_test)


@contextmanager
def shown() -> Iterator[None]:
    """In a worker, around the test: the failure itself, instead of what took it past Hypothesis."""
    __tracebackhide__ = True
    try:
        yield
    except _FirstFailure as failure:
        raise failure.error from failure.error.__cause__


def _ends_at_once(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        from hypothesis.errors import HypothesisException

        try:
            return test(*args, **kwargs)
        except (HypothesisException, SkipTest):  # assume() and its like
            raise
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            shown = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
            error.add_note(f"Failing example, as it was drawn: {test.__name__}({shown})")
            raise _FirstFailure(error) from None

    return run


def _settings(item: pytest.Function) -> Any:
    from hypothesis import settings

    return getattr(item.obj, "_hypothesis_internal_use_settings", None) or settings.default


def _change(item: pytest.Function, *checks: Any, **values: Any) -> None:
    """Other settings for this test, as Hypothesis's own plugin sets them; `checks` are suppressed as well."""
    from hypothesis import settings

    before = _settings(item)
    function: Any = getattr(item.obj, "__func__", item.obj)
    suppressed = {*before.suppress_health_check, *checks}
    function._hypothesis_internal_use_settings = settings(before, suppress_health_check=suppressed, **values)
