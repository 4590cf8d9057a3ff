"""What a task makes of an evaluation is tried on a few samples: what would fail on any is refused, the rest is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import disttrain
from disttrain.errors import ConfigurationError, TaskError
from disttrain.training.preflight.evaluation import check_evaluation
from tests.disttrain.task.users import Regression

SCORE = {"loss": torch.tensor(1.0), "mae": torch.tensor(2.0)}


def check(method: str, function: Any, base: type[disttrain.Task] = Regression) -> None:
    check_evaluation(type("Mine", (base,), {method: function})(), SCORE, 2, None)


def undefined(self: Any, *arguments: Any) -> Any:
    return nowhere  # type: ignore[name-defined]  # noqa: F821


def misnamed(self: Any, *arguments: Any) -> Any:
    return torch.tenser(0)


def misfit(self: Any, *arguments: Any) -> Any:
    return (lambda one: one)()  # type: ignore[call-arg]


@pytest.mark.parametrize("method", ["metrics", "details", "headline"])
@pytest.mark.parametrize(
    ("function", "words"), [(undefined, "NameError"), (misnamed, "AttributeError"), (misfit, "TypeError")]
)
def test_what_would_fail_on_any_samples_is_refused(method: str, function: Any, words: str) -> None:
    with pytest.raises(TaskError, match=rf"^Mine\.{method}: {words}: .* \(.*test_rehearsed_evaluation\.py:\d+\)$"):
        check(method, function)


def test_a_key_that_is_never_there_is_refused() -> None:
    for method in ("metrics", "details"):
        with pytest.raises(TaskError, match=rf"^Mine\.{method}: KeyError: 'los' \("):
            check(method, lambda self, sums, weight: {"mae": sums["los"]})
    with pytest.raises(TaskError, match=r"^Mine\.headline: KeyError: 'los' \("):
        check("headline", lambda self, metrics, details: metrics["los"])
    with pytest.raises(TaskError, match=r"^Mine\.headline without details, as at the end of a run: KeyError: 'total'"):
        check("headline", lambda self, metrics, details: details["total"], Counting)
    with pytest.raises(ConfigurationError, match=r"^Mine\.details returned what JSON cannot hold"):
        check("details", lambda self, sums, weight: {"seen": {1}})


class Counting(Regression):
    def details(self, sums: Any, weight: int) -> Any:
        return {"total": weight}


class Partial(Regression):
    """One of its metrics is there for many samples only."""

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"mae": 1.0, **({"auc": 0.5} if weight > 9 else {})}


def too_few(error: Exception) -> Any:
    def fails(self: Any, *arguments: Any) -> Any:
        raise error

    return fails


def unbound(self: Any, *arguments: Any) -> Any:
    for one in ():
        found = one
    return found


@pytest.mark.parametrize("method", ["metrics", "details", "headline"])
def test_what_may_come_of_few_samples_is_not(method: str) -> None:
    for error in (ValueError("one class"), ZeroDivisionError(), KeyError("cat"), IndexError(), TypeError("None + 1")):
        check(method, too_few(error))
    check(method, unbound)
    check(method, lambda self, *arguments: None.found)  # type: ignore[attr-defined]
    check("headline", lambda self, metrics, details: f"{metrics['auc']}", Partial)
    check("headline", lambda self, metrics, details: f"{details['total'] if details else ''}", Counting)
