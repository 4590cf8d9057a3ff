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


def test_who_sees_the_folder_can_lead_and_the_owner_keeps_its_lock(tmp_path: Path) -> None:
    assert run_workers(look, 2, args=(tmp_path,)) == [[True, True], [True, False]]
