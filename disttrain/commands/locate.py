"""What a checkpoint says of its run, and its model built again."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from disttrain.checkpoint import Checkpoint, check_describes_model
from disttrain.data import SampleSet, SplitOutline
from disttrain.errors import ConfigurationError, brief, printable
from disttrain.layout import STATE
from disttrain.models import build_model
from disttrain.recipe import KEYS_OF_CODE, Recipe, ask_before_importing, parse_recipe
from disttrain.recipe.reference import look_for_code
from disttrain.remote.find import find_checkpoint as find_checkpoint
from disttrain.task import Task, build_task, takes_images, task_maker
from disttrain.training.identity import describe_task, refuse_other_task
from disttrain.training.sets import model_arguments


def recipe_of(
    checkpoint: Checkpoint,
    overrides: tuple[str, ...] = (),
    *,
    trust: bool = False,
    imports: tuple[str, ...] = KEYS_OF_CODE,
) -> Recipe:
    """The recipe that the checkpoint was trained with. Raises RecipeError.

    Without `trust`, raises ConfigurationError if it names code at one of the keys `imports`, which the caller will have
    imported.
    """
    source = f"{checkpoint.path}/{STATE}"
    recipe = parse_recipe(checkpoint.state["recipe"], overrides, source=source)
    if not trust:
        ask_before_importing(recipe, source, overrides, imports)
    look_for_code(recipe, imports)
    return recipe


def data_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint was trained on: num_train, classes, sample_shape, dtype, mean, std.

    There is no mean and std of floats, and no dtype in older checkpoints. Raises ConfigurationError.
    """
    check_describes_model(checkpoint.state, f"{checkpoint.path}/{STATE}")
    data: dict[str, Any] = checkpoint.state["data"]
    return data


def training_set_of(checkpoint: Checkpoint) -> SplitOutline | SampleSet:
    """The training set as far as the checkpoint describes it: without its samples."""
    data = data_of(checkpoint)
    if "facts" in data:
        return SampleSet((), "", data["facts"])
    mean, std, dtype = data["mean"], data["std"], data.get("dtype", "uint8")
    channels, height, width = data["sample_shape"]
    return SplitOutline(
        tuple(data["classes"]),
        (channels, height, width),
        torch.float32 if dtype == "float32" else torch.uint8,
        None if mean is None else tuple(mean),
        None if std is None else tuple(std),
    )


def warn_of_unknown_preparation(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Warn where it is not known what was done to images: earlier versions wrote 0.5 for floats, too."""
    data = data_of(checkpoint)
    if "facts" not in data and "dtype" not in data and set(data["mean"]) == {0.5} and recipe.data.mean is None:
        print(
            f"warning: {printable(str(checkpoint.path))} is of an earlier version, which did not record whether the "
            "data set gave bytes or floats; if it gave floats, the predictions are wrong.",
            file=sys.stderr,
        )


def task_of(checkpoint: Checkpoint, recipe: Recipe, train_set: Any) -> Task:
    """The task that the model was trained for. Raises ConfigurationError if the recipe makes another one."""
    maker = task_maker(recipe)
    if takes_images(maker) is isinstance(train_set, SampleSet):
        kind = "samples of another kind" if isinstance(train_set, SampleSet) else "images with labels"
        raise ConfigurationError(
            f"{checkpoint.path}: trained on {kind}, and task.name = '{recipe.task.name}' does not take these."
        )
    task = build_task(maker, recipe, train_set)
    refuse_other_task(checkpoint.state, checkpoint.path, describe_task(task))
    return task


def refuse_objects(checkpoint: Checkpoint, keys: Collection[str], overrides: Collection[str] | None = None) -> None:
    """Raise ConfigurationError if what some of the recipe's `keys` name was given in Python as objects.

    The recipe then names something else; unless the `overrides`, of a command that takes them, name it.
    """
    replaced = {"task": "task.name", "model": "model.name", "test_set": "data.dataset"}
    named = {override.partition("=")[0].strip() for override in overrides or ()}
    missing = {
        given: key
        for given in checkpoint.state.get("given", ())
        if (key := replaced.get(given)) in keys and key is not None and key not in named
    }
    if not missing:
        return
    objects, names = " and ".join(f"{given}=…" for given in missing), " and ".join(missing.values())
    cure = "use it in Python (docs/python.md)"
    if overrides is not None:
        options = " ".join(f"-o {key}=package.module:callable" for key in missing.values())
        cure += f", or name what makes it: {options} --trust"
    raise ConfigurationError(
        f"{checkpoint.path}: trained with {objects} given in Python, and {names} of its recipe "
        f"name{'s' if len(missing) == 1 else ''} something else: {cure}"
    )


def restore_model(checkpoint: Checkpoint, recipe: Recipe, task: Task, train_set: Any) -> nn.Module:
    """The trained model, on the CPU. Raises ConfigurationError if the recipe builds one that the weights do not fit."""
    arguments = model_arguments(task, train_set)
    try:
        model = build_model(recipe.model, pretrained=False, **arguments)
    except ConfigurationError as error:
        raise ConfigurationError(f"{checkpoint.path}: {error}") from error
    except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        raise ConfigurationError(
            f"{checkpoint.path}: model.name = '{recipe.model.name}' cannot be built for {_described(train_set)}: "
            f"{brief(error) or type(error).__name__}"
        ) from error
    try:
        model.load_state_dict(dict(checkpoint.model))  # which a method of the model's own may change
    except RuntimeError as error:
        raise ConfigurationError(
            f"{checkpoint.path}: the weights do not fit model.name = '{recipe.model.name}': "
            f"{brief(str(error).splitlines()[-1])}"
        ) from error
    return model


def _described(train_set: Any) -> str:
    if isinstance(train_set, SampleSet):
        return f"samples with {brief(repr(dict(train_set.facts)))}"
    return f"{len(train_set.classes)} classes of images {train_set.sample_shape}"
