"""Keys that have an effect beside another key only."""

from __future__ import annotations

from typing import Any

from disttrain.recipe.model import Recipe, TaskRecipe

_FSDP, _SYNC = 'parallel.strategy = "fsdp"', "parallel.sync_every"
_EXACT = "parallel.exact"
_CROPS, _IMAGES = "data.crop_padding", f'task.name = "{TaskRecipe().name}"'
_NEEDED = {
    "parallel.shard_modules": _FSDP,
    "parallel.shard_size": _FSDP,
    "parallel.param_dtype": _FSDP,
    "parallel.reduce_dtype": _FSDP,
    "parallel.prefetch": _FSDP,
    "parallel.reshard_after_forward": _FSDP,
    "parallel.cpu_offload": _FSDP,
    "parallel.slices": _EXACT,
    "parallel.sync_fragments": _SYNC,
    "parallel.outer_learning_rate": _SYNC,
    "parallel.outer_momentum": _SYNC,
    "data.crop_fill": _CROPS,
    "data.flip": _IMAGES,
    "train.eval_views": _IMAGES,
}


def keys_without_effect(recipe: Recipe) -> list[str]:
    """A line for each key that the recipe sets in vain: not refused, as strategies may change when a run resumes."""
    parallel, defaults = recipe.parallel, Recipe()
    there = {
        _FSDP: parallel.strategy == "fsdp",
        _EXACT: parallel.exact,
        _SYNC: parallel.sync_every > 0,
        _CROPS: recipe.data.crop_padding > 0,
        _IMAGES: recipe.task.name == TaskRecipe().name or ":" in recipe.task.name,  # a task of one's own may use it
    }
    return [
        f"{dotted} has no effect without {needed}"
        for dotted, needed in _NEEDED.items()
        if not there[needed] and _value(recipe, dotted) != _value(defaults, dotted)
    ]


def _value(recipe: Recipe, dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return getattr(getattr(recipe, section), key)
