"""Which strategy a run is trained by: DistributedDataParallel, FSDP, exact mode, DataParallel, local training, or none.

But in local training, the gradient is the mean over the samples of the global batch, however unevenly the workers share
it.
"""

from __future__ import annotations

import torch
from torch import nn

from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.alone import Alone
from disttrain.parallel.data_parallel import DataParallel
from disttrain.parallel.ddp import Ddp
from disttrain.parallel.exact.strategy import Exact
from disttrain.parallel.local import Local
from disttrain.parallel.strategy import Strategy
from disttrain.parallel.sync_batchnorm import convert_sync_batchnorm
from disttrain.recipe import ParallelRecipe


def parallelize(model: nn.Module, world: World, recipe: ParallelRecipe, *, sync_batchnorm: bool = False) -> Strategy:
    """Choose how `model`, which is on the world's device unless it is to be sharded, is trained by all workers.

    Raises ConfigurationError if the strategy of the recipe does not fit this world. Every rank must call it.
    """
    if recipe.exact and (recipe.strategy != "fsdp" or world.size == 1):
        return Exact(model, world, recipe.slices)
    strategy, reason = choose_strategy(recipe.strategy, world.size, _visible_gpus(world.device))
    if recipe.sync_every:  # whatever of the others it would have been
        return Local(model, world, recipe)
    if sync_batchnorm and world.size > 1:
        model = convert_sync_batchnorm(model, world.device)
    if strategy == "fsdp":
        for key, is_set in (
            ("find_unused_parameters", recipe.find_unused_parameters),
            ("compress", recipe.compress != "none"),
        ):
            if is_set:
                raise ConfigurationError(f"parallel.{key} is for parallel.strategy = 'ddp': with 'fsdp' leave it out.")
        return _shard(model, world, recipe)
    if strategy == "ddp":
        return Ddp(model, reason, world, find_unused=recipe.find_unused_parameters, compress=recipe.compress)
    return {"dp": DataParallel, "none": Alone}[strategy](model, reason)


def choose_strategy(wanted: str, num_workers: int, num_gpus: int) -> tuple[str, str]:
    """The strategy ("ddp", "fsdp", "dp" or "none") and the reason for it; `num_gpus` are those that this process sees.

    Raises ConfigurationError for a strategy that cannot train with so many workers.
    """
    if num_workers > 1 and wanted in ("dp", "none"):
        raise ConfigurationError(
            f"parallel.strategy = '{wanted}' is for one process, and {num_workers} workers were started: "
            "use 'auto' or 'ddp', or start one worker (-n 1)."
        )
    if wanted == "fsdp":
        return (
            ("fsdp", "") if num_workers > 1 else ("none", "one worker, which holds the whole model: nothing to shard")
        )
    if wanted == "ddp" or num_workers > 1:
        return "ddp", f"DistributedDataParallel: {num_workers} worker{'s' if num_workers > 1 else ''}"
    if wanted == "dp" or (wanted == "auto" and num_gpus > 1):
        return "dp", (
            f"DataParallel: one process drives {num_gpus} GPUs and copies the model at every step; "
            "`-n gpu` starts a process for each GPU, which is faster"
            if num_gpus > 1
            else f"DataParallel over {num_gpus or 'no'} GPU{'' if num_gpus == 1 else 's'}: the same as training alone"
        )
    return "none", "one worker, no gradients to share"


def _shard(model: nn.Module, world: World, recipe: ParallelRecipe) -> Strategy:
    # Only now: they take a while to import.
    from disttrain.parallel.exact.fsdp import ExactFsdp
    from disttrain.parallel.fsdp import Fsdp

    if recipe.exact:
        return ExactFsdp(model, world, recipe)
    return Fsdp(model, world, recipe)


def _visible_gpus(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else 0
