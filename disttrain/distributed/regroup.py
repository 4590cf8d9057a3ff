"""A process group that broke, left behind for another one in the same processes."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from disttrain.distributed.connections import Connections
from disttrain.distributed.meeting import MissingRanks, met_again
from disttrain.distributed.verdicts import Verdict
from disttrain.distributed.world import World, init_gloo, with_shared_sums

_TO_CONNECT = timedelta(seconds=0.5)  # gloo tries five times, if a rank dies just then
_MOST_DOUBLINGS = 4  # a network or a machine that is slower than this does not train either
_LOOK_EVERY_S = 0.002


def rejoin(world: World, verdict: Verdict, unless: Callable[[], bool], num_failed: int = 0) -> World:
    """Form the process group that the `verdict` names; its workers must have left theirs, and every one must call it.

    Rank 0 serves their store where the verdict says; they stay with the one that they have if it names no other. They
    have longer to connect after `num_failed` groups that did not form although no worker had died. Raises
    RuntimeError if `unless` holds meanwhile, and MissingRanks if one does not come within the time that a step may
    take.
    """
    rank, size, before = verdict.rank, verdict.size, world.group
    assert rank is not None
    assert before is not None
    _abandon()
    if world.sums is not None:
        world.sums.abandon()
    host, port = verdict.host or before.host, verdict.port or before.port
    shared, in_time = before.store, before.hang_timeout_s
    if shared is None or (host, port) != (before.host, before.port):
        shared = met_again(host, port, serves=rank == 0, timeout=before.timeout, hang_timeout_s=in_time, unless=unless)
    to_connect = _TO_CONNECT * 2 ** min(num_failed, _MOST_DOUBLINGS)
    group = replace(before, store=shared, host=host, port=port, connections=Connections())
    store = PrefixStore(f"generation-{verdict.generation}", shared)
    _wait_for_all(store, rank, size, in_time, unless)
    # Torch numbers its groups, counts one that failed to form, too, and has ranks with other numbers wait for ever.
    dist.distributed_c10d._world.group_count = 0
    with group.connections.noted(group.port):
        init_gloo(store, rank, size, to_connect)
    dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))._set_default_timeout(group.timeout)
    local_rank, local_size = (rank, size) if verdict.local_rank is None else (verdict.local_rank, verdict.local_size)
    place = replace(world, rank=rank, local_rank=local_rank, size=size, local_size=local_size, group=group)
    return with_shared_sums(place, to_connect)


def let_go(error: BaseException) -> None:
    """Empty the frames that `error` has passed through: they hold the process group in which it was raised."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__


def _abandon() -> None:
    """Let the process group end, if there is one, on a thread of its own.

    Its destructor waits for every collective under way, and one that was receiving the middle of a message when its
    connection broke does not fail: gloo signals that only to those that wait for a beginning (torch 2.14).
    """
    if not dist.is_initialized():  # it failed to form
        return
    broken = [dist.group.WORLD]
    dist.destroy_process_group()
    threading.Thread(target=broken.clear, name="disttrain-broken-group", daemon=True).start()


def _wait_for_all(store: Store, rank: int, size: int, timeout_s: float, unless: Callable[[], bool]) -> None:
    """Gloo itself would wait as long as a collective may take, for a rank that has died on its way."""
    places = [f"here/{other}" for other in range(size)]
    store.set(places[rank], "")
    deadline = time.monotonic() + timeout_s
    while not store.check(places):
        if unless():
            raise RuntimeError("Timed out waiting for another worker, which is lost")
        if time.monotonic() > deadline:
            raise MissingRanks([other for other in range(size) if not store.check([places[other]])])
        time.sleep(_LOOK_EVERY_S)
