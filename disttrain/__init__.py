"""Distributed training that people can trust: the same bits anywhere, and nothing lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.recipe import Recipe as Recipe
    from disttrain.recipe import load_recipe as load_recipe
    from disttrain.task import Task as Task
    from disttrain.training.hooks import Hook as Hook
    from disttrain.training.hooks import HookContext as HookContext
    from disttrain.training.loop import train as train
    from disttrain.training.result import Result as Result

__version__ = "0.1.0"
__all__ = ["Hook", "HookContext", "Recipe", "Result", "Task", "load_recipe", "train"]

_HOMES = {
    "Hook": "disttrain.training.hooks",
    "HookContext": "disttrain.training.hooks",
    "Recipe": "disttrain.recipe",
    "load_recipe": "disttrain.recipe",
    "Task": "disttrain.task",
    "Result": "disttrain.training.result",
    "train": "disttrain.training.loop",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the launcher, which reads recipes only, never pays for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
