"""Workers on this machine: start them, watch them, end them together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from disttrain.distributed.ports import reserved_port
from disttrain.distributed.requests import heard_requests
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.left import left_behind
from disttrain_launch.local.watch import MOST_LOSSES, Watch
from disttrain_launch.local.worker import Worker
from disttrain_launch.messages import complain, say
from disttrain_launch.restarts import Restarts


def run_workers(
    group: WorkerGroup,
    restarts: Restarts | None = None,
    max_losses: int = MOST_LOSSES,
    how_to_resume: Callable[[], str] = str,
) -> NoReturn:
    """Run the group to its end, report what went wrong if something did, and exit with the workers' own code.

    After a failure that is worth a retry it is restarted, as `restarts` allow. Where workers continue without one that
    is lost, they do so after `max_losses` within ten minutes. If a loss ends the run, `how_to_resume` says what to do.
    """
    restarts = restarts or Restarts()
    with signals_heard() as signals:
        while True:
            with reserved_port() as port, _started(group, port) as (workers, replace):
                watch = Watch(group, workers, signals, replace, port, max_losses)
                outcome = watch.until_the_end()
            if sys.stdout.isatty() and watch.has_lost_the_console:
                say("\x1b[?25h")  # a progress bar had hidden the cursor
            if outcome.traceback:
                say(outcome.traceback.rstrip(), err=True)
            complain(outcome.message)
            if watch.was_asked_to_stop or not restarts.helps(outcome):
                break
            complain(f"restart {restarts.made} of {restarts.most} from the latest checkpoint")
    if restarts.gave_up:
        complain(restarts.gave_up)
    if outcome.is_loss:
        complain(how_to_resume())
    for pid, name in left_behind().items():
        complain(f"process {pid} ({name}), which the run's code has started, is still running; `kill {pid}` ends it")
    sys.exit(restarts.settled(outcome).exit_code)


@contextmanager
def signals_heard() -> Iterator[int]:
    """A file descriptor that gives the number of each signal received.

    Under `nohup`, SIGHUP stays ignored. SIGINT does not, although shells have background jobs ignore it: a user who
    sends it to a training job wants it to stop, and nothing is lost.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wake_before = signal.set_wakeup_fd(writer)
    before = {number: signal.signal(number, _hear) for number in (*heard_requests(), signal.SIGCHLD)}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wake_before)
        os.close(reader)
        os.close(writer)


def _hear(number: int, frame: FrameType | None) -> None:
    """Nothing to do here: Python has written the number to the wake-up descriptor."""


@contextmanager
def _started(group: WorkerGroup, port: int) -> Iterator[tuple[list[Worker], Callable[[Worker], Worker]]]:
    """The group's workers, and what starts another in the place of one. Whatever happens, none outlives the block."""
    # Each worker reads its standard input and ends when that closes: however this process dies, the kernel closes it.
    lifeline_of_workers, lifeline = os.pipe()
    console = os.dup(1), os.dup(2)
    workers: list[Worker] = []

    def replace(dead: Worker) -> Worker:
        workers.remove(dead)
        dead.close()
        workers.append(Worker(group, dead.rank, port, lifeline_of_workers, console, joins=True))
        return workers[-1]

    try:
        for rank in range(group.size):
            workers.append(Worker(group, rank, port, lifeline_of_workers, console))
        yield workers[:], replace
    finally:
        for worker in workers:
            worker.kill()
            worker.close()
        for descriptor in (lifeline_of_workers, lifeline, *console):
            os.close(descriptor)
