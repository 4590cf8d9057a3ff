"""What of a run's files all ranks can reach: on one machine, or on a file system that the machines share."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from disttrain.checkpoint.folder import WRITING, Checkpoint, hidden, identity_of, open_checkpoint
from disttrain.checkpoint.shards import Elsewhere, ShardStore
from disttrain.checkpoint.store import CheckpointStore
from disttrain.distributed.collectives import broadcast_from_main, max_
from disttrain.distributed.notices import Notices
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.files import make_folder
from disttrain.layout import STEP


def sharded_store(
    store: CheckpointStore, world: World, patience_s: float, elsewhere: Elsewhere | None = None
) -> ShardStore | None:
    """The store with each rank writing its part. Every rank must call it.

    `elsewhere`, on all ranks or none, is where ranks that cannot write there bring their parts to. Without it, and if
    one of them can write to neither, None.
    """
    token = broadcast_from_main(world, lambda: secrets.token_hex(8))
    probe = hidden(store.folder / f"{STEP}{token}", WRITING)  # what is left of it is cleared up like a checkpoint

    def make() -> bool:
        try:
            make_folder(store.folder)
            probe.mkdir()
        except OSError:
            return False  # the saves will fail, with a warning
        return True

    is_made = broadcast_from_main(world, make)
    try:
        (probe / str(world.rank)).mkdir()
        is_reached = True
    except OSError:
        is_reached = False
        # Rank 0 does not reach what a killed job has left here, maybe under another rank. No rank saves yet.
        for left in store.folder.glob(hidden(store.folder / f"{STEP}rank-*", WRITING).name):
            shutil.rmtree(left, ignore_errors=True)
    is_shared = _all(is_reached)
    if world.is_main:
        shutil.rmtree(probe, ignore_errors=True)
    if not is_shared:
        if elsewhere is None or not is_made:  # the same on all ranks
            return None
        if not _all(is_reached or elsewhere.can_write(f"{probe.name}-{world.rank}")):
            return None
    scratch = None if is_reached else hidden(store.folder / f"{STEP}rank-{world.rank}", WRITING)
    notices = Notices(f"disttrain/saves/{token}")
    return ShardStore(store, notices, world, patience_s, None if is_shared else elsewhere, scratch)


def opened_by_all(world: World, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint that rank 0 has verified, with its tensors readable on each rank from the same files.

    The others pass its outline. None if not every rank can reach the files. Every rank must call it.
    """
    path = Path(checkpoint.path)
    identity = broadcast_from_main(world, lambda: identity_of(path))
    opened: Checkpoint | None = checkpoint if world.is_main and identity is not None else None
    if not world.is_main and identity is not None and identity_of(path) == identity:
        try:
            found = open_checkpoint(path)
            opened = replace(checkpoint, model=found.model, optimizer=found.optimizer)
        except ConfigurationError:
            opened = None
    return opened if _all(opened is not None) else None


def _all(mine: bool) -> bool:
    return not max_(torch.tensor(0.0 if mine else 1.0))
