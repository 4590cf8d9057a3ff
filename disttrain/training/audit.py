"""An audit: one slice of a step is computed by a second worker as well, and the bits are compared.

So are the weights and the optimizer's state, of which every worker has a copy. Where bits differ, all compute the slice
once more; whoever has other bits than most, or than it had itself the first time, is named. See docs/recovery.md.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from disttrain.data import Batch, StepBatch
from disttrain.distributed.collectives import gather_objects, sum_
from disttrain.errors import AgreedError
from disttrain.parallel.exact.checksums import checksum_of, checksums
from disttrain.parallel.exact.slices import slices_of
from disttrain.parallel.exact.strategy import Exact
from disttrain.training.job import Job

_LOSS = "the loss"


class Corruption(AgreedError):
    """Workers have other bits than they should. Raised before the step is made, by all ranks alike.

    `ranks` are those that can be left out, so that the others compute the step again; `facts` are for the journal.
    """

    def __init__(self, message: str, ranks: Sequence[int], facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.ranks, self.facts = list(ranks), facts


@dataclass(frozen=True)
class Plan:
    """Who computes which slice in an audited step: a function of the step, and of the number of workers."""

    slice_index: int
    owner: int
    second: int

    @classmethod
    def of(cls, number: int, num_filled: int, num_slices: int, size: int) -> Plan:
        """The plan of the `number`-th audit, from 0, of a step in which `num_filled` slices have samples.

        In num_slices * (size - 1) audits each slice is computed by every worker that does not serve it.
        """
        slice_index = number % num_filled
        owner = next(rank for rank in range(size) if slice_index in slices_of(rank, size, num_slices))
        further = 1 + number // num_slices % (size - 1) if size > 1 else 0
        return cls(slice_index, owner, (owner + further) % size)


@dataclass(frozen=True)
class Finding:
    """What follows from several computations of one slice: who computed something else than it should have.

    Args:
        ranks: who did; empty if that cannot be known.
        why: in words.
        again: whether all that did, did so again.
    """

    ranks: list[int]
    why: str
    again: bool = False


def judge(first: Sequence[tuple[int, int]], again: Sequence[int]) -> Finding:
    """By what two computed that differed, (rank, checksum), and what each rank computed then, by rank."""
    (most, count), size = Counter(again).most_common(1)[0], len(again)
    unlike_itself = sorted({rank for rank, checksum in first if checksum != again[rank]})
    if size == 1:
        return Finding([0], "the code is not deterministic, or the worker faulty")
    if 2 * count > size:
        wrong = {rank for rank, checksum in first if checksum != most}
        repeated = {rank for rank, checksum in enumerate(again) if checksum != most}
        if 2 * len(wrong | repeated) < size or (size == 2 and len(wrong) == 1):
            words = "computed it wrong again" if repeated else "computed it right the second time"
            return Finding(sorted(wrong | repeated), words, bool(repeated))
    elif len(unlike_itself) == 1 and size == 2:
        return Finding(unlike_itself, "computed it differently the second time, and the other one did not")
    elif not unlike_itself and size == 2:
        return Finding(
            [], "each computed the same again: one of the two is faulty, and a third worker would tell which"
        )
    return Finding([], "the code is not deterministic, or several workers are faulty")


def is_audited(job: Job) -> bool:
    """Whether the step that comes next is."""
    every = job.recipe.parallel.audit_every_steps
    return every > 0 and (job.step + 1) % every == 0


def audit(
    job: Job, batch: StepBatch, losses: torch.Tensor, compute: Callable[[Job, Batch, StepBatch], torch.Tensor]
) -> None:
    """Compare what workers have and compute, between the last slice of a step and its sum. Every rank must call it.

    `compute` gives a part's share of the loss after its backward pass. Raises Corruption, on every rank alike.
    """
    strategy, world = job.strategy, job.world
    assert isinstance(strategy, Exact)
    number = (job.step + 1) // job.recipe.parallel.audit_every_steps - 1
    num_filled = min(batch.global_size, strategy.num_slices)
    plan = Plan.of(number, num_filled, strategy.num_slices, world.size)

    def computed_again() -> list[int]:
        parts = job.loader.parts(job.epoch, batch.step_in_epoch, plan.slice_index)
        share = torch.zeros_like(losses[0])
        for part in parts:
            share.add_(compute(job, part, batch))
        return [*checksums([share]), *strategy.checksums_apart(plan.slice_index)]

    mine: dict[str, list[int]] = {}
    if world.rank == plan.owner:
        mine["first"] = [*checksums([losses[plan.slice_index]]), *strategy.checksums(plan.slice_index)]
    if world.rank == plan.second:
        mine["second"] = computed_again()
    strategy.open_slice()  # puts back the buffers that all have alike
    table = _by_rank(
        job, [checksum_of(one) for one in (_state(job).values(), mine.get("first", ()), mine.get("second", ()))]
    )
    if len(set(table[:, 0].tolist())) > 1:
        raise _drift(job, table[:, 0].tolist())
    if table[plan.owner, 1] == table[plan.second, 2]:
        return
    mine["again"] = computed_again()
    names = [_LOSS, *(f"'{name}'" for name in strategy.audited)]
    raise _corruption(job, plan, names, gather_objects((_place(job), mine)))


def _corruption(
    job: Job, plan: Plan, names: Sequence[str], by_rank: Sequence[tuple[str, dict[str, list[int]]]]
) -> Corruption:
    first, second = by_rank[plan.owner][1]["first"], by_rank[plan.second][1]["second"]
    again = [checksum_of(mine["again"]) for _, mine in by_rank]
    finding = judge([(plan.owner, checksum_of(first)), (plan.second, checksum_of(second))], again)
    unlike = _unlike(names, first, second)
    what = f"{unlike} of slice {plan.slice_index} in step {job.step + 1}"
    places = {rank: by_rank[rank][0] for rank in finding.ranks or (plan.owner, plan.second)}
    if job.world.size == 1:
        words = f"{_named(places)} got two results for {what}: {finding.why}"
    elif finding.ranks:
        words = f"{_named(places)} computed {what} unlike the other workers, and {finding.why}"
    else:
        words = f"{_named(places)} computed {what} differently: {finding.why}"
    facts = {
        "what": "slice",
        "step": job.step + 1,
        "slice": plan.slice_index,
        "tensor": unlike,
        "ranks": finding.ranks,
        "compared_ranks": [plan.owner, plan.second],
        "places": [*places.values()],
        "again": finding.again,
        "reason": finding.why,
    }
    return Corruption(f"parallel.audit_every_steps: {words}.", finding.ranks if job.world.size > 1 else [], facts)


def agree_on_state(job: Job) -> None:
    """Refuse to continue from, or to save, weights that are not the same on all workers. Every rank must call it.

    Raises Corruption, on every rank alike. Without audits it does nothing.
    """
    if not job.recipe.parallel.audit_every_steps or job.world.size == 1:
        return
    table = _by_rank(job, [checksum_of(_state(job).values())])
    if len(set(table[:, 0].tolist())) > 1:
        raise _drift(job, table[:, 0].tolist())


def _drift(job: Job, first: Sequence[int]) -> Corruption:
    """What such a worker has added to steps is in the weights of all, so none is left out: a restart is needed.

    `first` are the checksums, by rank, that differed.
    """
    state = _state(job)
    by_rank: list[tuple[str, list[int]]] = gather_objects((_place(job), list(state.values())))
    again = [tuple(theirs) for _, theirs in by_rank]
    differs_again = len(set(again)) > 1
    ranks, is_known = _unlike_most(again if differs_again else first)
    places = {rank: by_rank[rank][0] for rank in (ranks if is_known else range(len(by_rank)))}
    if differs_again:
        most = next(theirs for rank, theirs in enumerate(again) if rank not in ranks)
        tensor = _unlike([f"'{name}'" for name in state], again[ranks[0]], most)
        does = f"{'has other bits than the other workers' if is_known else 'have different bits'} in {tensor}"
        why = f"{does}, which all should have alike: a fault of memory, or of the optimizer's step"
    else:
        tensor = ""
        does = "computed another checksum than the other workers" if is_known else "computed different checksums"
        why = f"{does} of what all should have alike, and the same one the second time: a passing fault"
    return Corruption(
        f"parallel.audit_every_steps: after step {job.step} {_named(places)} {why}. A restart resumes from the newest "
        "checkpoint: checkpoints are saved only while all agree.",
        [],
        {
            "what": "state",
            "step": job.step,
            "tensor": tensor,
            "ranks": ranks if is_known else [],
            "places": [*places.values()],
            "again": differs_again,
        },
    )


def _unlike_most(by_rank: Sequence[object]) -> tuple[list[int], bool]:
    """Who has something else than what is there most often, and whether most have that."""
    ((most, count),) = Counter(by_rank).most_common(1)
    return [rank for rank, one in enumerate(by_rank) if one != most], 2 * count > len(by_rank)


def _by_rank(job: Job, numbers: Sequence[int]) -> torch.Tensor:
    """What each rank passes, (ranks, numbers) int64."""
    table = torch.zeros(job.world.size, len(numbers), dtype=torch.int64)
    table[job.world.rank] = torch.tensor(numbers)
    return sum_(table)


def _named(places: Mapping[int, str]) -> str:
    return " and ".join(f"rank {rank} ({place})" for rank, place in places.items())


def _unlike(names: Sequence[str], one: Sequence[int], other: Sequence[int]) -> str:
    return next((name for name, a, b in zip(names, one, other, strict=False) if a != b), "the result")


def _place(job: Job) -> str:
    return f"{socket.gethostname()}, {job.world.device}"


def _state(job: Job) -> dict[str, int]:
    """Checksums of what all workers have alike, by name; nothing for a single one."""
    if job.world.size == 1:
        return {}
    tensors = job.model_tensors()
    tensors |= {f"optimizer: {name}": tensor for name, tensor in job.optimizer_tensors()[0].items()}
    return dict(zip(tensors, checksums(tensors.values()), strict=True))
