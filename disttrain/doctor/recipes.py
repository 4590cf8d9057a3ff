"""What a recipe asks for: names that are installed, and data that are there and intact."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext

from disttrain.doctor.checks import Question
from disttrain.doctor.finding import Finding, failure, ok, warning
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.recipe import DataRecipe, Recipe, check_installed, load_recipe
from disttrain.recipe.address import expanded
from disttrain.recipe.reference import look_for_code

_DOWNLOADED = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


def asked(question: Question) -> Recipe | None:
    """The recipe that is examined, or None. Raises RecipeError."""
    return None if question.recipe is None else load_recipe(question.recipe, question.overrides)


def recipe(question: Question) -> Iterator[Finding]:
    """Whether the recipe is valid, and what it names is installed."""
    try:
        found = asked(question)
        assert found is not None
        check_installed(found)
    except ConfigurationError as error:
        yield failure(
            "recipe",
            "; ".join(str(error).splitlines()),
            "Correct the recipe: `disttrain recipe show NAME` prints a shipped one with every key explained.",
        )
    else:
        yield ok("recipe", f"{found.name}: {found.model.name} on {found.data.dataset}")


def data(question: Question) -> Iterator[Finding]:
    """Whether the recipe's data set is there and whole, by the checks of training. Downloads nothing."""
    try:
        found = asked(question)
    except RecipeError:
        yield warning("data", "not looked at, since the recipe is wrong", "Correct the recipe first.")
        return
    assert found is not None
    if _will_be_downloaded(found.data):
        yield warning(
            "data",
            f"{found.data.dataset} is not in {found.data.root}; the first start downloads it",
            "If the workers have no internet access, download it there first.",
        )
        return
    look_for_code(found)
    yield _loaded(found.data, images=found.task.name == "image-classification")


def _will_be_downloaded(data: DataRecipe) -> bool:
    root = expanded(data.root)
    names = _DOWNLOADED.get(data.dataset)
    return names is not None and data.download and not any((root / name).exists() for name in names)


def _loaded(data: DataRecipe, *, images: bool) -> Finding:
    import torch

    from disttrain.data import load_datasets
    from disttrain.distributed.world import World

    alone = World(0, 0, 1, 1, torch.device("cpu"), "this machine")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sets = load_datasets(data.model_copy(update={"download": False}), alone, nullcontext, images=images)
    except ConfigurationError as error:
        return failure("data", str(error), "Put complete files there, or point data.root to another folder.")
    finally:
        logging.disable(before)
    return ok("data", f"{data.dataset}: {len(sets.train):,} training and {len(sets.test):,} test samples")
