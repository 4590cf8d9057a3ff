"""Find the checkpoint that a user means by RUN or CHECKPOINT."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from disttrain.checkpoint import Checkpoint, CheckpointStore, check_describes_model, read_checkpoint
from disttrain.errors import ConfigurationError, UsageError, brief, printable
from disttrain.layout import MANIFEST, is_checkpoint
from disttrain.models import build_model
from disttrain.recipe import KEYS_OF_CODE, Recipe, ask_before_importing, parse_recipe
from disttrain.recipe.address import is_url
from disttrain.remote import local_copy
from disttrain.runs.rundir import CHECKPOINTS, RECIPE, is_run


def find_checkpoint(address: str | Path) -> Checkpoint:
    """The checkpoint at a path or URL, or the newest good one of the run there.

    Raises UsageError if there is neither, ConfigurationError if it, or all of the run, is damaged. Changes nothing
    on disk.
    """
    with local_copy(str(address), checkpoints="newest") as path:
        found = _find(path)
        if is_url(address):
            found = replace(found, path=str(found.path).replace(str(path), str(address).rstrip("/")))
        return found


def _find(path: Path) -> Checkpoint:
    if is_checkpoint(path):
        return read_checkpoint(path)
    if not is_run(path):
        raise UsageError(_what_is_wrong_with(path))
    oldest_first = CheckpointStore(path / CHECKPOINTS).paths()
    for candidate in reversed(oldest_first):
        try:
            return read_checkpoint(candidate)
        except ConfigurationError as error:
            if candidate == oldest_first[0]:
                raise
            print(printable(f"warning: {error} The checkpoint before it is used."), file=sys.stderr)
    raise UsageError(f"{path} has no good checkpoint yet.")


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
    source = f"{checkpoint.path}/state.json"
    recipe = parse_recipe(checkpoint.state["recipe"], overrides, source=source)
    if not trust:
        ask_before_importing(recipe, source, overrides, imports)
    return recipe


def data_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint was trained on: num_train, classes, sample_shape, dtype, mean, std.

    There is no mean and std of floats, and no dtype in older checkpoints. Raises ConfigurationError.
    """
    check_describes_model(checkpoint.state, f"{checkpoint.path}/state.json")
    data: dict[str, Any] = checkpoint.state["data"]
    return data


def refuse_other_than_pictures(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise ConfigurationError unless what it was trained on can be made of a picture file."""
    data = data_of(checkpoint)
    channels, mean = data["sample_shape"][0], data["mean"]
    if data.get("dtype") == "float32":
        raise ConfigurationError(
            f"{checkpoint.path}: trained on floats that its data set made, and how it makes them of a picture is not "
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


def _what_is_wrong_with(path: Path) -> str:
    if not os.path.exists(path):
        return f"{brief(path)} does not exist: give a run directory (see `disttrain runs list`) or a checkpoint in it."
    return f"{path} is neither a run directory (no {RECIPE}) nor a checkpoint (no {MANIFEST})."
