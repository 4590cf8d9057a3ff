"""Keys that have an effect beside another key only."""

from __future__ import annotations

from disttrain.recipe.model import ParallelRecipe, Recipe

_FSDP, _SYNC = 'parallel.strategy = "fsdp"', "parallel.sync_every"
_NEEDED = {
    "shard_modules": _FSDP,
    "shard_size": _FSDP,
    "prefetch": _FSDP,
    "cpu_offload": _FSDP,
    "outer_learning_rate": _SYNC,
    "outer_momentum": _SYNC,
}


def keys_without_effect(recipe: Recipe) -> list[str]:
    """A line for each key that the recipe sets in vain: not refused, as strategies may change when a run resumes."""
    parallel, defaults = recipe.parallel, ParallelRecipe()
    there = {_FSDP: parallel.strategy == "fsdp", _SYNC: parallel.sync_every > 0}
    return [
        f"parallel.{key} has no effect without {needed}"
        for key, needed in _NEEDED.items()
        if not there[needed] and getattr(parallel, key) != getattr(defaults, key)
    ]
