"""The kernels of a compiled model, made before the first step, so that no step's time is that of a compiler."""

from __future__ import annotations

import time

import torch

from disttrain.distributed.collectives import gather_objects
from disttrain.errors import is_out_of_memory
from disttrain.training.compiled import GRAPH_PASSES, replays_graphs
from disttrain.training.job import Job
from disttrain.training.preflight.model import quietly, rehearse


def warm_up(job: Job) -> str | None:
    """Compute batches of the sizes that training has, to no effect; what was done, in words, or None.

    Every rank must call it, after `check_model`: what fails for another reason than a batch's size is named there.
    """
    settings = job.recipe.train
    if not settings.compile:
        return None
    # In exact mode a worker may have to serve any slice, when another one is lost.
    began, sizes = time.monotonic(), job.loader.sizes(of_all_slices=job.recipe.parallel.exact)
    job.compiles_in("training", sizes)
    job.progress.at("compiling the model", job.step, patient=True)
    # Equally many on all ranks, as a model may have collectives of its own.
    rounds = max(map(len, gather_objects(sizes)))
    with quietly(job, training=True, compiled=True):
        for size in (sizes * rounds)[:rounds]:
            data = job.loader.samples(0, torch.arange(size))
            for _ in range(GRAPH_PASSES[settings.compile_mode] if replays_graphs(settings, job.world.device) else 1):
                try:
                    with torch.autocast(job.world.device.type, job.autocast, job.autocast is not None):
                        loss = job.strategy.loss(job.task.loss, data, num_samples=size, is_last=False)
                    loss.backward()  # type: ignore[no-untyped-call]
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise  # else the first step will say how much there has to be
                job.optimizer.zero_grad(set_to_none=True)
    rehearse(job)  # so that gradients meet in the first step as they do without all this
    return f"compiled for batches of {' and '.join(map(str, sizes))} in {time.monotonic() - began:.1f} s"
