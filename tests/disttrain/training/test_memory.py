"""What a step frees stays with the process while a run trains."""

from __future__ import annotations

from pathlib import Path

import psutil

import disttrain
from disttrain.testing import run_workers
from tests.disttrain.distributed.test_allocator import needs_glibc
from tests.disttrain.task.test_users_tasks import QUIET
from tests.disttrain.task.users import case

BLOCKS, BLOCK = 5, 16 << 20


class Resident(disttrain.Hook):
    """Fills and frees 80 MiB after each step, and notes how many bytes of memory the process has before and after."""

    def __init__(self) -> None:
        self.noted: list[int] = []

    def after_step(self, context: disttrain.HookContext) -> None:
        self.noted.append(psutil.Process().memory_info().rss)
        blocks = [b"x" * BLOCK for _ in range(BLOCKS)]
        del blocks
        self.noted.append(psutil.Process().memory_info().rss)


@needs_glibc
def test_a_step_finds_the_memory_of_the_step_before(tmp_path: Path) -> None:
    def train() -> list[int]:
        one, resident = case("regression"), Resident()
        objects = {"task": one.task, "model": one.model, "train_set": one.train_set, "test_set": one.test_set}
        disttrain.train(QUIET, run_dir=tmp_path / "run", hooks=[resident], **objects)
        return [*resident.noted, psutil.Process().memory_info().rss]

    first, *others, at_the_end = run_workers(train, 1, process_group=False)[0]
    assert min(others) - first > BLOCKS * BLOCK * 0.8
    assert at_the_end - first < BLOCKS * BLOCK * 0.5, "a user's process should get its memory back"
