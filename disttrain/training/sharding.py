"""A run whose model is sharded: what it cannot do, refused by name, and how a model is made that fits nowhere whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import nn

from disttrain.distributed.allocator import available_memory
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.models.spill import LargeTensorsInFiles
from disttrain.recipe import Recipe
from disttrain.training.given import Given

# Each number of a parameter is changed by its own gradient and state alone, so a part of them can be changed by itself.
_ELEMENTWISE = frozenset(
    {"sgd", "adam", "adamw", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"}
)


def refuse_unshardable(recipe: Recipe, world: World, given: Given) -> None:
    """Raise ConfigurationError for settings that `parallel.strategy = "fsdp"` cannot be combined with."""
    if not is_to_shard(recipe, world):
        return
    size = recipe.parallel.shard_size
    if size and world.size % size:
        raise ConfigurationError(
            f"parallel.shard_size = {size}: that many workers hold one copy of the model together, and {world.size} "
            f"were started: start a multiple of {size}, or set parallel.shard_size = 0 (one copy)."
        )
    why: dict[str, bool] = {
        f"optim.name = '{recipe.optim.name}', which needs whole tensors or is not tried with shards: use "
        "'sgd', 'adam' or 'adamw'": recipe.optim.name not in _ELEMENTWISE,
        "parallel.param_dtype = 'bf16' without train.precision = 'bf16': set both": (
            recipe.parallel.param_dtype == "bf16" and recipe.train.precision != "bf16"
        ),
        "parallel.param_dtype or reduce_dtype = 'bf16' in exact mode, which has the bits of DDP: leave them out": (
            recipe.parallel.exact and "bf16" in (recipe.parallel.param_dtype, recipe.parallel.reduce_dtype)
        ),
        "train.precision = 'fp16': use 'bf16' or 'fp32'": recipe.train.precision == "fp16",
        "optim.fused = true in exact mode, since its kernel's bits depend on how a parameter is cut: set it to false": (
            recipe.parallel.exact and bool(recipe.optim.options.get("fused"))
        ),
        "parallel.cpu_offload = true in exact mode, which is not tried: set one of the two to false": (
            recipe.parallel.exact and recipe.parallel.cpu_offload and world.device.type != "cpu"
        ),
        "train.compile = true: set it to false": recipe.train.compile,
        "train.channels_last = true, whose order no part of a weight could keep: set it to false": (
            recipe.train.channels_last
        ),
        "train.spike_factor and a model given as an object, since the run begins anew after a spike: give a function "
        "that makes it": recipe.train.spike_factor > 0 and isinstance(given.model, nn.Module),
    }
    for reason, applies in why.items():
        if applies:
            raise ConfigurationError(f"parallel.strategy = 'fsdp' cannot be combined with {reason}.")


def is_to_shard(recipe: Recipe, world: World) -> bool:
    """Whether each worker is to hold a part of the model only."""
    return recipe.parallel.strategy == "fsdp" and world.size > 1


def constructing(recipe: Recipe, world: World, folder: Path | None) -> AbstractContextManager[object]:
    """A context for the model's constructor: see `LargeTensorsInFiles`.

    The workers of a machine have half of its memory in it: the other half is for the parts that they keep.
    """
    if folder is None or not is_to_shard(recipe, world):
        return nullcontext()
    return LargeTensorsInFiles(folder, available_memory() // (2 * world.local_size))
