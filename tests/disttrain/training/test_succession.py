"""Who can take the place of rank 0 on another machine."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from disttrain.distributed.collectives import broadcast_object
from disttrain.errors import ConfigurationError
from disttrain.recipe import parse_recipe
from disttrain.runs.lock import owned
from disttrain.testing import run_workers
from disttrain.training.succession import Succession


def monitor_of(run_dir: Path, *, is_main: bool) -> Any:
    world = SimpleNamespace(is_main=is_main, slot=0 if is_main else 1)
    saver = SimpleNamespace(address=str(run_dir))
    return SimpleNamespace(run_dir=run_dir, saver=saver, job=SimpleNamespace(world=world))


def look(folder: Path) -> list[bool]:
    """What this rank knows of the place of rank 0: as one that sees the run's folder, and as one with another folder.

    Then rank 1 tries to own the folder.
    """
    rank = dist.get_rank()
    with owned(folder) if rank == 0 else nullcontext():
        broadcast_object(None)
        seen = []
        for run_dir in (folder, folder if rank == 0 else folder / "elsewhere"):
            seen.append(Succession(monitor_of(run_dir, is_main=rank == 0), leads=rank == 0).is_possible)
        if rank == 1:
            with pytest.raises(ConfigurationError, match="is in use"), owned(folder, patience_s=0.0):
                pass
        broadcast_object(None, 1)
    return seen


def test_a_lock_of_another_machine_is_waited_for_as_long_as_the_others_wait(tmp_path: Path) -> None:
    """An NFS server keeps it for a while after its owner's machine was lost."""
    waited = []
    for slot, hang_timeout_s in ((None, 600.0), (1, 600.0), (1, 60.0)):
        monitor = monitor_of(tmp_path, is_main=True)
        monitor.job.world.slot = None  # alone: there is nobody to meet
        monitor.job.recipe = parse_recipe({"train": {"hang_timeout_s": hang_timeout_s}})
        succession = Succession(monitor, leads=False)
        monitor.job.world.slot = slot
        waited.append(succession._to_be_free_s())
    assert waited == [2.0, 120.0, 30.0]


def test_who_sees_the_folder_can_lead_and_the_owner_keeps_its_lock(tmp_path: Path) -> None:
    assert run_workers(look, 2, args=(tmp_path,)) == [[True, True], [True, False]]
