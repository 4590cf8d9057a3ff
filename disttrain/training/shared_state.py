"""What a worker that joins, or is a step behind, gets from another one: everything that a checkpoint has."""

from __future__ import annotations

import time
from dataclasses import dataclass

from disttrain.checkpoint import AVERAGE, optimizer_from_tensors
from disttrain.checkpoint.stored import outline_of
from disttrain.distributed.collectives import broadcast_object
from disttrain.distributed.packed import broadcast_many
from disttrain.faultpoints import reached
from disttrain.runs.rundir import refuse_edited_recipe
from disttrain.training.contents import contents_of
from disttrain.training.job import Job
from disttrain.training.monitor import RunMonitor


@dataclass(frozen=True)
class Sent:
    """How many bytes of tensors went to each of the others, and how many seconds it took, as this rank saw it."""

    num_bytes: int = 0
    seconds: float = 0.0


def share_state(job: Job, monitor: RunMonitor, source: int, *, is_behind: bool) -> Sent:
    """Have all that are behind take everything from rank `source`: nothing is changed before all of it is there.

    Every rank must call it. Raises ConfigurationError on one that has joined with another recipe.
    """
    began, is_source = time.monotonic(), job.world.rank == source
    own, optimizer, state = contents_of(job)
    optimizer = optimizer if is_source else {}
    own_state = (outline_of(optimizer), state, monitor.last_result, monitor.last_num_items)
    outlines, state, result, num_items = broadcast_object(own_state if is_source else None, source)
    all_of_it = [*own.values(), *(optimizer if is_source else outlines).values()]
    received = broadcast_many(all_of_it, source, keeps=is_behind)
    sent = Sent(sum(one.nbytes for one in all_of_it), time.monotonic() - began)
    if not is_behind:
        return sent
    refuse_edited_recipe(state["recipe"], job.recipe)
    reached("recovery: received", step=job.step)
    for tensor, value in zip(own.values(), received, strict=False):
        tensor.detach().copy_(value)
    tensors = dict(zip(outlines, received[len(own) :], strict=True))
    of_optimizer = {name: tensor for name, tensor in tensors.items() if not name.startswith(AVERAGE)}
    optimizer_from_tensors(job.optimizer, of_optimizer, state["optimizer"], job.model)
    if job.ema is not None:
        job.ema.load({name.removeprefix(AVERAGE): one for name, one in tensors.items() if name.startswith(AVERAGE)})
    job.non_finite.load_state(state["non_finite"])
    job.strategy.load_state(state, "the state of another worker")
    job.early_stopping.load_state(state["best_evaluation"])
    job.step, job.metrics, job.init = state["step"], state["metrics"] or None, state.get("init")
    monitor.receive(result, num_items)
    return sent
