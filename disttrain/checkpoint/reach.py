"""What of a run's files all ranks can reach: on one machine, or on a file system that the machines share."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from disttrain.checkpoint.folder import WRITING, Checkpoint, hidden, identity_of, open_checkpoint
from disttrain.checkpoint.shards import ShardStore
from disttrain.checkpoint.store import CheckpointStore
from disttrain.distributed.collectives import broadcast_from_main, max_
from disttrain.distributed.notices import Notices
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.files import make_folder
from disttrain.layout import STEP


def sharded_store(store: CheckpointStore, world: World, patience_s: float) -> ShardStore | None:
    """The store with each rank writing its part; None if not every rank can write there. Every rank must call it."""
    token = broadcast_from_main(world, lambda: secrets.token_hex(8))
    probe = hidden(store.folder / f"{STEP}{token}", WRITING)  # what is left of it is cleared up like a checkpoint

    def make() -> None:
        try:
            make_folder(store.folder)
            probe.mkdir()
        except OSError:
            pass  # the saves will fail, with a warning

    broadcast_from_main(world, make)
    try:
        (probe / str(world.rank)).mkdir()
        is_reached = True
    except OSError:
        is_reached = False
    is_shared = _all(is_reached)
    if world.is_main:
        shutil.rmtree(probe, ignore_errors=True)
    return ShardStore(store, Notices(f"disttrain/saves/{token}"), world, patience_s) if is_shared else None


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
