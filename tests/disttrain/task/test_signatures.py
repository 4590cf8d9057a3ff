"""A method that takes other arguments than it is called with is refused by name, before anything calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import disttrain
from disttrain.errors import ConfigurationError
from disttrain.recipe import Recipe
from disttrain.task import build_task
from disttrain.training.hooks import build_hooks
from tests.disttrain.task.users import Regression


def with_method(name: str, method: Any) -> disttrain.Task:
    task: disttrain.Task = type("Mine", (Regression,), {name: method})()
    return task


def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any) -> Any:
        return method(self, "more", *arguments)

    return wrapper


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        (
            "prepare",
            lambda self, batch, draw: batch,
            r"^Mine\.prepare takes \(self, batch, draw\), and has to take \(self, batch, draw, \*, training\) "
            r"\(.*test_signatures\.py:\d+\)\.$",
        ),
        ("loss", lambda model, batch: 0, r"loss takes \(model, batch\), and has to take \(self, model, batch\) \("),
        ("weight", lambda self: 1, r"weight takes \(self\), and has to take \(self, batch\) \("),
        ("metrics", lambda self, sums: {}, r"metrics takes \(self, sums\), and has to take \(self, sums, weight\) \("),
        ("headline", lambda self, metrics: "", r"headline takes .*, and has to take \(self, metrics, details\) \("),
        ("collate", staticmethod(lambda samples, pad: 0), r"takes \(samples, pad\), and has to take \(samples\) \("),
        ("weight", 0.5, r"^Mine\.weight is a float, and has to be a method: rename it\.$"),
    ],
)
def test_a_task_whose_method_cannot_be_called_is_refused(name: str, method: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build_task(with_method(name, method), Recipe(), [])
    with pytest.raises(ConfigurationError, match=words):
        build_task(lambda: with_method(name, method), Recipe(), [])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("prepare", lambda self, *arguments, **options: arguments[0]),
        ("prepare", lambda self, batch, draw, training, scale=2: batch),
        ("collate", staticmethod(lambda samples, pad=0: samples)),
        ("metrics", classmethod(lambda kind, numbers, total: {})),
        ("details", torch.no_grad()(lambda self, sums, weight: {})),
        ("details", decorated(lambda self, extra, sums, weight: {})),
        ("details", functools.partial(dict)),
        ("losses", None),
        ("read", ["what", "it", "has", "read"]),
    ],
)
def test_whatever_can_be_called_is_taken(name: str, method: Any) -> None:
    build_task(with_method(name, method), Recipe(), [])


class Wrong(disttrain.Hook):
    def after_evaluation(self) -> None:  # type: ignore[override]
        raise AssertionError


class Loose(disttrain.Hook):
    def after_step(self, *arguments: Any) -> None:
        raise AssertionError


def test_a_hook_whose_method_cannot_be_called_is_refused() -> None:
    words = r"Wrong\.after_evaluation takes \(self\), and has to take \(self, context\) \(.*test_signatures\.py:\d+\)"
    for given in (Wrong, [Loose(), Wrong()]):
        with pytest.raises(ConfigurationError, match=rf"^the hook .*:{words}"):
            build_hooks((), given)
    assert build_hooks((), Loose)
