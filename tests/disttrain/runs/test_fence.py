"""Who has lost a run to another process writes to it no more, even where no lock keeps it from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disttrain.checkpoint import CheckpointStore
from disttrain.distributed.lease import Lease, now
from disttrain.layout import EPOCH, LEASE
from disttrain.runs.fence import Fence
from disttrain.runs.journal import Journal


class Ended(BaseException):
    """The process would have ended."""


def end(why: str) -> None:
    raise Ended(why)


def test_who_wakes_up_after_another_has_taken_the_run_writes_nothing(tmp_path: Path) -> None:
    fence = Fence(tmp_path, end)
    journal, store = Journal(tmp_path / "journal.jsonl", guard=fence.check), CheckpointStore(tmp_path / "checkpoints")
    store.guard = fence.check
    journal.event("before")
    store.save({"a": torch.ones(1)}, {}, {"step": 1, "metrics": {}})

    Fence(tmp_path, end).check()  # another one: it may write
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Ended, match="another worker has taken the run, as this one stood still"):
        journal.event("after")
    with pytest.raises(Ended):
        store.save({"a": torch.zeros(1)}, {}, {"step": 1, "metrics": {}})
    with pytest.raises(Ended):
        store.save({"a": torch.zeros(1)}, {}, {"step": 2, "metrics": {}})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_lease_that_is_over_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease()
    monkeypatch.setenv(LEASE, str(lease.fileno()))
    lease.extend(now() + 600)
    fence = Fence(tmp_path, end)
    fence.check()
    later = now() + 601
    monkeypatch.setattr("disttrain.distributed.lease.now", lambda: later)
    with pytest.raises(Ended, match="not heard from the leading one for too long"):
        fence.check()
    lease.close()


def test_a_folder_that_was_cleaned_up_does_not_end_the_run(tmp_path: Path) -> None:
    fence = Fence(tmp_path, end)
    for content in (None, "", "?"):
        (tmp_path / EPOCH).unlink()
        if content is not None:
            (tmp_path / EPOCH).write_text(content)
        fence.check()
        (tmp_path / EPOCH).touch()
