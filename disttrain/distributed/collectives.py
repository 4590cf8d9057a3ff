"""The named collectives. Every rank must call each of them, in the same order; a name ending in `_` works in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from disttrain.distributed.travelling import all_in, head_of, packed, size_in, unpacked
from disttrain.errors import DisttrainError, PeerError

if TYPE_CHECKING:
    from disttrain.distributed.shared_sums import SharedSums
    from disttrain.distributed.world import World

Decision = TypeVar("Decision")
_DAY = timedelta(days=1)
_LOOK_EVERY = timedelta(seconds=0.25)
_is_broken: ContextVar[Callable[[], bool] | None] = ContextVar("is_broken", default=None)


@contextmanager
def interruptible(is_broken: Callable[[], bool]) -> Iterator[None]:
    """Have collectives in the block raise RuntimeError, a moment after `is_broken` holds, in place of waiting on.

    A broken connection fails gloo's collectives at once, but for one that is receiving the middle of a message just
    then: that would wait as long as a collective may take (torch 2.14).
    """
    token = _is_broken.set(is_broken)
    try:
        yield
    finally:
        _is_broken.reset(token)


def is_interrupted() -> bool:
    """Whether what waits in an `interruptible` block is to wait no more; for what waits by other means than torch's."""
    is_broken = _is_broken.get()
    return is_broken is not None and is_broken()


def _complete(begin: Callable[[bool], dist.Work | None]) -> None:
    """Begin a collective, asynchronously or not, and wait for it."""
    if _is_broken.get() is None:
        begin(False)
    elif work := begin(True):
        wait_for(work)


def wait_for(work: dist.Work) -> None:
    """Wait for a collective that was begun before, as `interruptible` has it."""
    is_broken = _is_broken.get()
    was_broken = False
    while is_broken is not None:
        try:
            work.wait(_LOOK_EVERY)
            return
        except RuntimeError:
            if work.is_completed():  # the error may be of the wait alone
                break
            if was_broken:
                raise RuntimeError("Timed out waiting for a collective whose connections are broken") from None
            was_broken = is_broken()
    work.wait()  # raises if it has failed


def sum_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Replace `tensor` by its sum over all ranks, or those of a group."""
    _complete(lambda is_async: dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=is_async))
    return tensor


def sum_ahead(number: int, num_ranks: int) -> Callable[[], int]:
    """Begin to sum a whole number over the `num_ranks` ranks; calling the result waits for the sum.

    It travels while other things are computed.
    """
    if num_ranks == 1:
        return lambda: number
    total = torch.tensor(number, dtype=torch.int64)
    work = dist.all_reduce(total, op=dist.ReduceOp.SUM, async_op=True)

    def finish() -> int:
        wait_for(work)
        return int(total)

    return finish


def max_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its maximum over all ranks."""
    _complete(lambda is_async: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=is_async))
    return tensor


def deal_out(
    pieces: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Send each rank of a group its `pieces`, all of one type, joined; return what each sent here, (sizes[rank],)."""
    sent = torch.cat([piece.reshape(-1) for of_rank in pieces for piece in of_rank])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, list(sizes), [sum(map(torch.numel, of_rank)) for of_rank in pieces], group)
    return list(torch.split(received, list(sizes)))


def broadcast_(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Replace `tensor`, of any type, by the one that rank `source` holds."""
    if tensor.numel():
        whole = tensor.contiguous()
        raw = whole.reshape(-1).view(torch.uint8)  # gloo and NCCL do not support every type
        _complete(lambda is_async: dist.broadcast(raw, src=source, async_op=is_async))
        if whole is not tensor:
            tensor.copy_(whole)
    return tensor


def broadcast_object(value: Any, source: int = 0) -> Any:
    """What rank `source` passed, on every rank."""
    is_source = dist.get_rank() == source
    raw = packed(value) if is_source else None
    head = broadcast_(head_of(raw), source)
    whole = all_in(head)
    if whole is None:
        whole = broadcast_(torch.empty(size_in(head), dtype=torch.uint8) if raw is None else raw, source)
    return value if is_source else unpacked(whole)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank passed, by rank, on every rank."""
    raw = packed(value)
    heads = _gathered(head_of(raw), group)
    sizes = [size_in(head) for head in heads]
    wholes = [whole for head in heads if (whole := all_in(head)) is not None]
    if len(wholes) == len(heads):
        return [unpacked(whole) for whole in wholes]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: raw.numel()] = raw
    return [unpacked(one[:size]) for one, size in zip(_gathered(padded, group), sizes, strict=True)]


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The tensor of each rank, all of one shape."""
    of_all = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    _complete(lambda is_async: dist.all_gather(of_all, tensor, group=group, async_op=is_async))
    return of_all


def num_issued(device: torch.device, sums: SharedSums | None = None) -> int:
    """How many collectives this rank has begun, in whatever group and in `sums`, finished or not; any thread may ask.

    All ranks begin the same ones in the same order: one that has begun fewer than another is behind it.
    """
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    places = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
    begun: int = sum(
        one._get_backend(place)._get_sequence_number_for_group()
        for one in groups
        for place in places
        if place in one._device_types
    )
    return begun + (sums.num_begun if sums is not None else 0)


@contextmanager
def one_per_machine_first(world: World) -> Iterator[None]:
    """Let one worker of each machine through the block before the others: it prepares files that they then find.

    A failure of the first is raised on every rank as its own, so that no rank waits for one that has gone.
    """
    # A group of its own, because a download may take longer than a collective ever should.
    patient = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_DAY))
    failure: Exception | None = None
    if world.is_local_main:
        try:
            yield
        except Exception as error:
            failure = error
    failures = [error for error in gather_objects(_portable(failure), patient) if error is not None]
    dist.destroy_process_group(patient)
    if failures:
        raise failure if failure is not None else failures[0]
    if not world.is_local_main:
        yield


def broadcast_from_main(world: World, decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns on rank 0, on every rank; what it raises there is raised everywhere."""
    decision: Any = None
    failure: Exception | None = None
    if world.is_main:
        try:
            decision = decide()
        except Exception as error:
            failure = error
    answer, remote_failure = broadcast_object((decision, _portable(failure)))
    if world.is_main and failure is not None:
        raise failure
    if remote_failure is not None:
        raise remote_failure
    return cast("Decision", answer)


def _portable(failure: Exception | None) -> DisttrainError | None:
    """A failure that can travel: a library's exception may not survive being sent; its own rank reports it."""
    if failure is None or (isinstance(failure, DisttrainError) and failure.trace is None):
        return failure
    what = str(failure) if isinstance(failure, DisttrainError) else f"{type(failure).__name__}: {failure}"
    return PeerError(f"rank {dist.get_rank()} failed: {what}")
