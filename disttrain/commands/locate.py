"""What a checkpoint says of its run, and its model built again."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from disttrain.checkpoint import Checkpoint, check_describes_model
from disttrain.errors import ConfigurationError, brief, printable
from disttrain.layout import STATE
from disttrain.models import build_model
from disttrain.recipe import KEYS_OF_CODE, Recipe, ask_before_importing, parse_recipe
from disttrain.remote.find import find_checkpoint as find_checkpoint


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
    return recipe


def data_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint was trained on: num_train, classes, sample_shape, dtype, mean, std.

    There is no mean and std of floats, and no dtype in older checkpoints. Raises ConfigurationError.
    """
    check_describes_model(checkpoint.state, f"{checkpoint.path}/{STATE}")
    data: dict[str, Any] = checkpoint.state["data"]
    return data


def refuse_other_than_pictures(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise ConfigurationError unless what it was trained on can be made of a picture file."""
    data = data_of(checkpoint)
    channels, mean = data["sample_shape"][0], data["mean"]
    if data.get("dtype") == "float32":
        raise ConfigurationError(
            f"{checkpoint.path}: trained on floats that its data set made, and how it makes them from a picture is not "
            "known here: give them to the model from Python, or train on bytes (uint8) with data.mean and data.std."
        )
    if channels not in (1, 3):
        raise ConfigurationError(
            f"{checkpoint.path}: trained on images of {channels} channels, and pictures are read in 3 (colour) or 1 "
            "(grey)."
        )
    # Earlier versions wrote 0.5 for floats, too, whatever their data set had done.
    if "dtype" not in data and set(mean) == {0.5} and recipe.data.mean is None:
        print(
            f"warning: {printable(str(checkpoint.path))} is of an earlier version, which did not note whether the data "
            "set gave bytes or floats; if it gave floats, the answers are wrong.",
            file=sys.stderr,
        )


def refuse_objects(checkpoint: Checkpoint, keys: Collection[str], overrides: Collection[str] = ()) -> None:
    """Raise ConfigurationError if what one of the recipe's `keys` names was given in Python as an object.

    The recipe then names something else; unless one of the `overrides` names it.
    """
    replaced = {"model": "model.name", "test_set": "data.dataset"}
    named = {override.partition("=")[0].strip() for override in overrides}
    for given in checkpoint.state.get("given", ()):
        key = replaced.get(given)
        if key in keys and key not in named:
            raise ConfigurationError(
                f"{checkpoint.path}: trained with {given}=… given in Python, and {key} of its recipe names something "
                f"else: use it in Python (docs/python.md), or name it for `evaluate`: -o {key}=package.module:callable."
            )


def restore_model(checkpoint: Checkpoint, recipe: Recipe) -> nn.Module:
    """The trained model, on the CPU. Raises ConfigurationError if the recipe builds one that the weights do not fit."""
    data = data_of(checkpoint)
    shape = tuple(data["sample_shape"])
    try:
        model = build_model(recipe.model, num_classes=len(data["classes"]), sample_shape=shape, pretrained=False)
    except ConfigurationError as error:
        raise ConfigurationError(f"{checkpoint.path}: {error}") from error
    except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        raise ConfigurationError(
            f"{checkpoint.path}: model.name = '{recipe.model.name}' cannot be built for {len(data['classes'])} classes "
            f"of images {shape}: {brief(error) or type(error).__name__}"
        ) from error
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{checkpoint.path}: the weights do not fit model.name = '{recipe.model.name}': "
            f"{brief(str(error).splitlines()[-1])}"
        ) from error
    return model
