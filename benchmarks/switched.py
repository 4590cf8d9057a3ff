"""A worker that is ready for a loss in some of its blocks of steps, and in the others as one that would restart.

`ready.py` starts it in the place of `python -m disttrain`. It trains as that does, but for a switch before some steps:
what readiness does in an undisturbed step, evaluation and checkpoint is on after it, or off. When is a matter of the
step alone, so that nothing has to be agreed on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from disttrain.__main__ import command
from disttrain.distributed import collectives
from disttrain.terminal.output import have_unbreakable_output
from disttrain.training import loop
from disttrain.training.job import Job
from disttrain.training.recovery import Recovery
from disttrain.worker import leave, worker

RECORDS, BLOCK, COUNTS = "READY_RECORDS", "READY_BLOCK", "READY_COUNTS"  # variables of the environment
_PROCESS_CLOCK = 2  # of another process: see clock_getcpuclockid(3)


def is_on(block: int, rank: int) -> bool:
    """Whether it is on for a rank in a block, from 0: for ranks 0 and 1, the others, the others, and 0 and 1 again.

    In the next four blocks it is the other way round.
    """
    first_two = (block % 4 in (0, 3)) != (block // 4 % 2 == 1)
    return first_two == (rank < 2)


class Switched(Recovery):
    """Where the recipe says "restart", there is nothing to switch, and the blocks are all alike."""

    def __init__(self, job: Job, *arguments: object) -> None:
        super().__init__(job, *arguments)  # type: ignore[arg-type]
        self._on = self._verdicts, self._monitor.saver.is_passed_on
        self._is_broken: Callable[[], bool] | None = None
        self._block_steps = int(os.environ[BLOCK])
        self._records = Path(os.environ[RECORDS], f"{job.world.rank}")
        self._num_calls = 0

    def before_step(self) -> None:
        block, rest = divmod(self._job.step, self._block_steps)
        if rest == self._block_steps // 3:  # far from a checkpoint, which is written beside the steps after it
            self._begin(block)
        super().before_step()

    def _begin(self, block: int) -> None:
        sys.setprofile(None)
        launcher_s = time.clock_gettime((~os.getppid() << 3) | _PROCESS_CLOCK)
        with self._records.open("a") as records:
            records.write(f"{time.process_time()} {launcher_s} {self._num_calls}\n")
        if self._on[0] is not None:
            self._is_broken = self._is_broken or collectives._is_broken.get()
            self._turn(on=is_on(block, self._job.world.rank))
        if os.environ.get(COUNTS):
            sys.setprofile(self._count)

    def _turn(self, *, on: bool) -> None:
        self._verdicts, self._monitor.saver.is_passed_on = self._on if on else (None, False)
        collectives._is_broken.set(self._is_broken if on else None)

    def _count(self, frame: object, event: str, argument: object) -> None:
        self._num_calls += event in ("call", "c_call")


if __name__ == "__main__":
    loop.Recovery = Switched  # type: ignore[misc]
    have_unbreakable_output()
    leave(worker(command))
