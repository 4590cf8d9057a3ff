"""What a program hands to `disttrain.train` as objects, in place of what the recipe names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from disttrain.recipe import Recipe
from disttrain.task import Task
from disttrain.training.hooks import Hook


@dataclass(frozen=True)
class Given:
    """Each is None where the recipe's name stands."""

    model: nn.Module | Callable[..., nn.Module] | None = None
    train_set: Any = None
    test_set: Any = None
    task: Task | Callable[..., Task] | None = None
    hooks: Sequence[Hook | Callable[[], Hook]] | Hook | Callable[[], Hook] | None = None

    def names(self) -> frozenset[str]:
        """Which were given."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def data_name(self) -> str:
        """What the class of the training set is called, without torch's wrappers; empty if that says nothing."""
        found = self.train_set
        while type(found).__module__.startswith("torch.utils.data") and hasattr(found, "dataset"):
            found = found.dataset
        kind = type(found)
        is_telling = kind.__module__.partition(".")[0] not in ("builtins", "torch", "numpy", "disttrain")
        return kind.__name__ if is_telling else ""

    def run_name(self, recipe: Recipe) -> str:
        """What runs are called of a recipe without a name: after the model and the data set, given or named."""
        model, data = recipe.model.name, recipe.data.dataset
        if self.model is not None:
            model = getattr(self.model, "__name__", type(self.model).__name__)  # a class or a function has one
        if self.train_set is not None:
            data = self.data_name
        words = (re.sub(r"[^\w.]+", "-", name.rpartition(":")[2]).strip("-").lower() for name in (model, data))
        return "-".join(word for word in words if word)


def model_words(recipe: Recipe, *, is_given: bool) -> str:
    """Which model it is, for messages: by the key that names it, unless a given one replaces the default."""
    named = f"model.name = '{recipe.model.name}'"
    if not is_given:
        return named
    is_default = "model" not in recipe.model_fields_set or "name" not in recipe.model.model_fields_set
    return "the model given" if is_default else f"the model given in place of {named}"
