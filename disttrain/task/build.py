"""The task that a recipe names, or that a program gave."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from disttrain.errors import ConfigurationError, DisttrainError, defined_at, failure_in
from disttrain.recipe import Recipe
from disttrain.recipe.names import misfit, nearest
from disttrain.recipe.reference import import_callable
from disttrain.task.base import Task
from disttrain.task.images import ImageClassification
from disttrain.task.signatures import check_signatures

_BUILT_IN = {
    "image-classification": "disttrain.task.images:ImageClassification",
    "language-modeling": "disttrain.task.language:LanguageModeling",
    "tabular": "disttrain.task.tabular:Tabular",
}

_NOT_ALWAYS_CALLED = ("losses", "report", "predict", "in_words", "read", "export", "export_notes")
"""A task that has data under these names trains all the same."""

Maker = Task | Callable[..., Any]
"""A task, or what makes one of `task.options`, `train_set` and `recipe`."""


def task_maker(recipe: Recipe, given: Task | Callable[..., Any] | None = None) -> Maker:
    """The task that was `given`, or what `task.name` names. Raises ConfigurationError if there is no such thing."""
    if given is not None:
        kind = given if isinstance(given, type) else type(given)
        if issubclass(kind, nn.Module) and not issubclass(kind, Task):
            raise ConfigurationError(
                f"the task given: a {kind.__name__} is a model and not a disttrain.Task; pass it as `model`."
            )
        if not isinstance(given, Task) and not callable(given):
            raise ConfigurationError(
                f"task: a {type(given).__name__} is neither a disttrain.Task nor a class or function that makes one; "
                "the recipe's task.name takes names."
            )
        return _with_loss(given)
    if recipe.task.name in _BUILT_IN:
        module, _, name = _BUILT_IN[recipe.task.name].partition(":")
        made: Callable[..., Any] = getattr(import_module(module), name)  # where it is needed: each has its imports
        return made
    return _with_loss(import_callable(recipe.task.name, "task.name"))


def _with_loss(maker: Maker) -> Maker:
    """Raise ConfigurationError for a task, or its class, that has no loss: before any data is read for it."""
    kind = maker if isinstance(maker, type) else type(maker)
    if not issubclass(kind, Task) or kind.loss is not Task.loss or "loss" in getattr(maker, "__dict__", {}):
        return maker
    own = {name for name in dir(kind) if callable(getattr(kind, name, None))} - set(dir(Task))
    near = nearest("loss", own)
    hint = f"; did you mean its method {near} to be loss?" if near else "."
    raise ConfigurationError(
        f"{kind.__name__} ({defined_at(kind)}) does not define loss(model, batch), which a task needs{hint}"
    )


def takes_images(maker: Maker) -> bool:
    """Whether the task learns from a data set of images and labels, and not from samples of any kind."""
    return isinstance(maker, ImageClassification) or (
        isinstance(maker, type) and issubclass(maker, ImageClassification)
    )


def build_task(maker: Maker, recipe: Recipe, train_set: Any, *, is_given: bool = False) -> Task:
    """The task. Raises ConfigurationError for options that it does not take, and for a method with other arguments.

    Raises UserCodeError for what its constructor raises.

    `is_given`: a program gave the maker, in place of the recipe's name.
    """
    if isinstance(maker, Task):
        return _checked(maker)
    name = getattr(maker, "__qualname__", type(maker).__name__)
    source = "the task given" if is_given else f"task.name = '{recipe.task.name}'"
    arguments = {"train_set": train_set, "recipe": recipe}
    for key in arguments.keys() & recipe.task.options.keys():
        raise ConfigurationError(f"task.options.{key}: disttrain passes that itself; leave it out.")
    try:
        signature = inspect.signature(maker)
    except ValueError:  # a callable without a signature, written in C
        arguments = {}
    else:
        arguments = {key: value for key, value in arguments.items() if key in signature.parameters}
        try:
            signature.bind(**(arguments | recipe.task.options))
        except TypeError as error:
            known = [key for key in signature.parameters if key not in ("train_set", "recipe")]
            raise ConfigurationError(misfit("task.options", name, recipe.task.options, known, error)) from error
    try:
        task = maker(**(arguments | recipe.task.options))
    except DisttrainError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise failure_in(source, error) from error
    if not isinstance(task, Task):
        raise ConfigurationError(f"{source}: {name} returned a {type(task).__name__}, not a disttrain.Task.")
    return _checked(task)


def _checked(task: Task) -> Task:
    check_signatures(task, Task, type(task).__name__, may_be_data=_NOT_ALWAYS_CALLED)
    items: Any = task.items
    if not isinstance(items, str) or not items.strip():
        raise ConfigurationError(
            f'{type(task).__name__}.items is {items!r}: it has to be what `weight` counts, in the plural, as "tokens".'
        )
    return task


def has_own(task: Task, *methods: str) -> bool:
    """Whether the task defines one of these methods itself, in place of the default."""
    return any(getattr(type(task), method) is not getattr(Task, method) for method in methods)
