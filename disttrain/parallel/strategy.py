"""How the workers' gradients meet: DistributedDataParallel, exact mode, DataParallel, or one worker alone.

The gradient is always the mean over the samples of the global batch, however unevenly the workers share it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel

from disttrain.distributed.collectives import broadcast_
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.ddp import WrappedModel
from disttrain.parallel.exact.slices import ExactSlices
from disttrain.parallel.sync_batchnorm import convert_sync_batchnorm
from disttrain.recipe import ParallelRecipe


@dataclass(frozen=True)
class Parallel:
    """A model ready for training by all workers.

    `forward` is what to call in training, `model` the bare one: its names are those of every checkpoint.
    A loss that has been summed over a worker's samples and divided by the size of the global batch must be multiplied
    by `loss_scale` before `backward`. `reason` says in a line why this way was chosen.

    Each step's global batch is cut into `num_slices` slices, of which this worker serves `slices`: one of as many as
    there are workers, or in exact mode several of as many as the recipe says.
    """

    name: str
    reason: str
    model: nn.Module
    forward: Callable[..., Any]
    loss_scale: float = 1.0
    without_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    slices: range = range(1)
    num_slices: int = 1
    exact: ExactSlices | None = None
    ddp: WrappedModel | None = None

    def open_slice(self) -> None:
        """Called before the first micro-batch of a slice."""
        if self.exact is not None:
            self.exact.open()
        if self.ddp is not None:
            self.ddp.share_odd_()

    def close_slice(self, slice_index: int) -> None:
        """Called after the last micro-batch of a slice."""
        if self.exact is not None:
            self.exact.close(slice_index)

    def finish_step(self, global_size: int, step: int = 0) -> None:
        """Called after the last slice of a step: now the gradients are the global batch's. Every rank must call it.

        Raises ConfigurationError, on this rank only, if the model left parameters without a gradient that the other
        workers wait for. `step` counts the steps done before.
        """
        if self.exact is not None:
            self.exact.finish(min(global_size, self.num_slices))
        if self.ddp is not None:
            self.ddp.finish_backward(f"in step {step + 1}")

    def backward_of(self, *, is_last: bool) -> AbstractContextManager[None]:
        """The context for one micro-batch: gradients travel once per step, with the last one."""
        return nullcontext() if is_last else self.without_sync()

    def share_buffers_(self) -> None:
        """Replace every worker's buffers (BatchNorm's statistics) by rank 0's. Every rank must call it."""
        if self.exact is not None:
            return  # they are the same already
        for buffer in self.model.buffers():
            if buffer.layout == torch.strided:  # sparse ones are constant, see WrappedModel
                broadcast_(buffer)


def parallelize(model: nn.Module, world: World, recipe: ParallelRecipe, *, sync_batchnorm: bool = False) -> Parallel:
    """Choose how gradients meet, and wrap `model`, which is on the world's device already.

    Raises ConfigurationError if the strategy of the recipe does not fit this world. Every rank must call it.
    """
    if recipe.exact:
        exact = ExactSlices(model, world, recipe.slices)
        reason = f"exact mode: {recipe.slices} slices, the same bits with 1 to {recipe.slices} workers"
        return Parallel("exact", reason, model, model, slices=exact.slices, num_slices=recipe.slices, exact=exact)
    strategy, reason = choose_strategy(recipe.strategy, world.size, _visible_gpus(world.device))
    if sync_batchnorm and world.size > 1:
        model = convert_sync_batchnorm(model, world.device)
    if strategy == "ddp":
        ddp = WrappedModel(model, world, find_unused=recipe.find_unused_parameters)
        # DDP divides the summed gradients by the number of workers; our losses are shares of the global mean already.
        return Parallel(
            "ddp",
            reason,
            model,
            ddp,
            loss_scale=float(world.size),
            without_sync=ddp.no_sync,
            slices=range(world.rank, world.rank + 1),
            num_slices=world.size,
            ddp=ddp,
        )
    if strategy == "dp":
        return Parallel("dp", reason, model, DataParallel(model))
    return Parallel("none", reason, model, model)


def choose_strategy(wanted: str, num_workers: int, num_gpus: int) -> tuple[str, str]:
    """The strategy ("ddp", "dp" or "none") and the reason for it; `num_gpus` are those that this process sees.

    Raises ConfigurationError for a strategy that cannot train with so many workers.
    """
    if num_workers > 1 and wanted in ("dp", "none"):
        raise ConfigurationError(
            f"parallel.strategy = '{wanted}' is for one process, and {num_workers} workers were started: "
            "use 'auto' or 'ddp', or start one worker (-n 1)."
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


def _visible_gpus(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else 0
