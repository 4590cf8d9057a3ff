"""Whether all ranks have failed, found out without a collective: one that has not failed would never join it."""

from __future__ import annotations

import time

import torch.distributed as dist

from disttrain.distributed.world import store_for_a_thread

_PATIENCE_S = 5.0  # for ranks that do the same thing at the same time; those that succeed may be waiting for this one
_PAUSE_S = 0.05


def all_fail(where: str) -> bool:
    """Whether every rank calls this for the same `where`, within seconds: each calls it once, and only if it fails."""
    store = store_for_a_thread(_PATIENCE_S)
    if store is None:
        return True
    key, until = f"disttrain/failed/{where}", time.monotonic() + _PATIENCE_S
    try:
        num_failed = store.add(key, 1)
        while num_failed < dist.get_world_size():
            if time.monotonic() >= until:
                store.add(key, -1)
                return False
            time.sleep(_PAUSE_S)
            num_failed = store.add(key, 0)
    except RuntimeError:  # the store has gone, with the rank that serves it
        return False
    return True
