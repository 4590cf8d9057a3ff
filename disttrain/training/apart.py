"""What each worker has of its own where workers train apart: its optimizer, and between two meetings its weights.

A checkpoint has it as "worker.RANK.NAME", so that a run resumes at any step as if it had not stopped. With another
number of workers each continues from the run's model, with the optimizer that one of the former workers had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from disttrain.checkpoint import Checkpoint, optimizer_from_tensors
from disttrain.checkpoint.handout import hand_out
from disttrain.distributed.by_rank import gather_to_main, scatter_from_main
from disttrain.distributed.collectives import gather_objects
from disttrain.errors import ConfigurationError, brief
from disttrain.health.nonfinite_apart import ApartNonFiniteGuard
from disttrain.layout import STATE
from disttrain.parallel.local import Local
from disttrain.training.job import Job

WORKERS = "workers"
Outline: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]
_WORKER, _OUTER, _OPTIMIZER, _MODEL = "worker.", "outer.", "optimizer.", "model."


def why_no_outer_step(job: Job) -> str | None:
    """Why the run makes no outer step for some of the model, if its workers train apart and never make one."""
    strategy, num_steps, parallel = job.strategy, job.total_steps, job.recipe.parallel
    num_without = strategy.fragments.num_never_due(num_steps) if isinstance(strategy, Local) else 0
    if not num_without:
        return None
    of = f" for {num_without} of {parallel.sync_fragments} fragments" if num_without < parallel.sync_fragments else ""
    return f"parallel.sync_every = {parallel.sync_every}, and the run has {num_steps} steps: it makes no outer step{of}"


def gathered_apart(job: Job) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint has in place of an optimizer's tensors, and as part of its state: on rank 0, else nothing.

    Every rank must call it. Raises DivergedError, on every rank, if one is about to end the run and only waits for the
    others: a run that resumed from there, with what ended it mended, would end all the same.
    """
    strategy, guard = _parts(job)
    of_optimizer, rest = job.optimizer_tensors()
    mine = {f"{_OPTIMIZER}{name}": tensor for name, tensor in of_optimizer.items()}
    mine |= {f"{_MODEL}{name}": tensor for name, tensor in strategy.own_tensors().items()}
    state = {"values": rest["values"], "scaler": job.scaler.state_dict(), "non_finite": guard.own_state()}
    outlines = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()}
    by_rank: list[tuple[dict[str, Any], Outline, bool]] = gather_objects((state, outlines, guard.ends))
    if any(ends for *_, ends in by_rank):
        guard.agree()
    found: dict[str, torch.Tensor] = {}
    for name, shape, dtype in _forms(theirs for _, theirs, _ in by_rank):
        fits = outlines.get(name) == (shape, dtype)
        tensors = gather_to_main(mine[name] if fits else torch.empty(shape, dtype=dtype))
        for rank, tensor in enumerate(tensors):
            if by_rank[rank][1].get(name) == (shape, dtype):
                found[f"{_WORKER}{rank}.{name}"] = tensor
    if not job.world.is_main:
        return {}, {}
    found |= {f"{_OUTER}{name}": tensor for name, tensor in strategy.outer_tensors().items()}
    return found, {WORKERS: [theirs for theirs, *_ in by_rank]}


def resume_apart(job: Job, checkpoint: Checkpoint) -> None:
    """Put back what `gathered_apart` gave, after the model: `checkpoint` is an outline on the other ranks than 0.

    Every rank must call it. Raises ConfigurationError, on every rank, for what does not fit.
    """
    strategy, guard = _parts(job)
    where = f"{checkpoint.path}/{STATE}"
    states = checkpoint.state.get(WORKERS)
    if not isinstance(states, list) or not states or not all(isinstance(one, dict) for one in states):
        raise ConfigurationError(f"{where} lacks '{WORKERS}', which a run with parallel.sync_every resumes from.")
    is_same, former = len(states) == job.world.size, [rank % len(states) for rank in range(job.world.size)]
    own: dict[str, torch.Tensor] = {}
    prefixes = [f"{_WORKER}{rank}." for rank in range(len(states))]
    outlines: list[Outline] = [
        {name: (tuple(one.shape), one.dtype) for name, one in _under(prefix, checkpoint.optimizer).items()}
        for prefix in prefixes
    ]
    mine = outlines[former[job.world.rank]]
    for name, shape, dtype in _forms(outlines):
        if name.startswith(_MODEL) and not is_same:
            continue
        like = torch.empty(shape, dtype=dtype)
        theirs = [
            checkpoint.optimizer[f"{prefixes[rank]}{name}"] if outlines[rank].get(name) == (shape, dtype) else like
            for rank in former
        ]
        received = scatter_from_main(theirs, like)
        if mine.get(name) == (shape, dtype):
            own[name] = received
    outer = hand_out(job.world, _under(_OUTER, checkpoint.optimizer))
    state = states[former[job.world.rank]]
    try:
        strategy.load(outer, _under(_MODEL, own))
        rest = {**checkpoint.state["optimizer"], "values": state["values"]}
        optimizer_from_tensors(job.optimizer, _under(_OPTIMIZER, own), rest, job.model)
        if state["scaler"]:
            job.scaler.load_state_dict(state["scaler"])
        guard.load_own_state(state["non_finite"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{where}: '{WORKERS}' does not fit: {brief(error)}.") from error


def _parts(job: Job) -> tuple[Local, ApartNonFiniteGuard]:
    assert isinstance(job.strategy, Local)
    assert isinstance(job.non_finite, ApartNonFiniteGuard)
    return job.strategy, job.non_finite


def _forms(outlines: Iterable[Outline]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Every name with every form that it has on some worker: mostly one, in the order of the first worker."""
    found = dict.fromkeys((name, *form) for outline in outlines for name, form in outline.items())
    return list(found)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
