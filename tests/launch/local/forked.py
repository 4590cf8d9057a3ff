"""A launcher whose workers are forks of this process, which has imported everything: a loss costs no start of Python.

    python -m tests.launch.local.forked '[{"folder": FOLDER, "signals": [[POINT, RANK, COUNT, NUMBER], ...]}, ...]'

trains the small job of exact mode once for each, see `Run`, and prints how it ended, in JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook

import disttrain.training.loop  # noqa: F401  # here once, and not in each worker
from disttrain import faultpoints
from disttrain.distributed import collectives, shared_memory
from disttrain.distributed.ports import reserved_port
from disttrain.distributed.report import report_failure, report_finished
from disttrain.distributed.shared_sums import SharedSums
from disttrain.errors import is_lost_peer
from disttrain.layout import CONSOLE, ERROR_FILE, VERDICTS
from disttrain.parallel.exact import ahead
from disttrain.parallel.exact.ahead import SumAhead
from disttrain_launch.local import worker as worker_module
from disttrain_launch.local import workers as workers_module
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.watch import Watch
from tests.disttrain.parallel.exact_runs import train

NEW = 100
# It has buffers that a step changes before a loss can interrupt it.
_MODEL = "model.name=tests.disttrain.parallel.exact_runs:build"


class _Fork:
    """As much of a `Popen` as a launcher's worker needs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _forking(work: Callable[[int], object]) -> Callable[..., _Fork]:
    """What starts a worker that does `work`, which is given its rank, plus NEW for each one that had it before."""
    before: Counter[int] = Counter()

    def start(
        arguments: Sequence[str], environment: Mapping[str, str], lifeline: int, output: Any, keep: Sequence[int]
    ) -> _Fork:
        rank = int(environment["RANK"])
        whose = rank + NEW * before[rank]
        before[rank] += 1
        pid = os.fork()
        if not pid:
            with suppress(OSError):  # not Linux
                Path("/proc/self/comm").write_text(f"rank-{rank}")  # by which a test finds it
            _become_a_worker(lambda: work(whose), environment, keep)
        return _Fork(pid)

    return start


def _become_a_worker(work: Callable[[], object], environment: Mapping[str, str], keep: Sequence[int]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(environment)
        os.environ |= {ERROR_FILE: f"/dev/fd/{keep[0]}", CONSOLE: "2 2"}
        os.dup2(2, 1)  # standard output is the launcher's
        for name in os.listdir("/dev/fd"):
            if int(name) > 2 and int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        work()
        report_finished()
        code = 0
    except BaseException as error:
        traceback.print_exc()
        report_failure(f"{type(error).__name__}: {error}", 1, None, time.time(), consequence=is_lost_peer(error))
    finally:
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Run:
    """A job with its injuries.

    Args:
        folder: of the run.
        size: how many workers.
        signals: (point, rank, count, number): the worker that was started as this rank gets signal `number` when it
            passes the named point for this time, or so much later: "step + 0.01"; with "flip" as the number, a bit of a
            gradient flips. For a rank's first replacement it is
            the rank + NEW, for the second the rank + 2 * NEW.
        waits_at: before its steps of these numbers, counted with those that it repeats, rank 0 waits until the launcher
            gives a verdict, `waits_s` seconds at most.
        deaths: how often each rank but 0 is lost: whoever is started as one of these, but for the last, is killed once
            all are there, at one of the points of a step. Rank 0 waits before each step until a worker comes.
        overrides: of the recipe.
        most_losses: after how many within minutes the launcher gives up.
        too_late: whether replacements begin when rank 0 evaluates, which it continues once one has a place; and whether
            rank 0 ends after them.
        machines: a letter for the machine that each rank takes itself to be on, as far as memory is shared: "aab".
    """

    folder: str
    size: int = 4
    signals: Sequence[Sequence[Any]] = ()
    waits_at: Sequence[int] = ()
    waits_s: float = 60.0
    deaths: int = 0
    overrides: Sequence[str] = ()
    most_losses: int = 10
    too_late: bool = False
    machines: str = ""


class _Script:
    """What happens at the named points of a worker."""

    def __init__(self, run: Run, rank: int) -> None:
        self._signals = {(point, count): number for point, whose, count, number in run.signals if whose == rank}
        self._waits_at, self._waits_s = run.waits_at if rank == 0 else (), run.waits_s
        self._passed: dict[str, int] = {}
        self._evaluates = Path(f"{run.folder}.evaluates") if run.too_late and rank == 0 else None
        self._size, self._waits = run.size, run.deaths > 0 and rank == 0
        before, original = divmod(rank, NEW)
        points = ("step", "before the commit", "after the commit")
        self._dies_at = points[(before + original) % 3] if original and before < run.deaths else ""

    def reached(self, name: str, where: Mapping[str, Any]) -> None:
        """As a test's faults have it."""
        self._passed[name] = count = self._passed.get(name, 0) + 1
        for point, when in self._signals:
            at, _, seconds = point.partition(" + ")
            if (at, when) == (name, count):
                if self._signals[point, when] == "flip":
                    faultpoints._flip(where["model"], "gradient", 20)
                else:
                    self._send(self._signals[point, when], float(seconds or 0.0))
        if name == self._dies_at and self._all_are_there() and where["step"] > 1:  # else the run cannot continue yet
            self._send(signal.SIGKILL, 0.0)
        if name == "step" and (count in self._waits_at or (self._waits and not self._all_are_there())):
            select.select([int(os.environ[VERDICTS])], [], [], self._waits_s)

        if name == "evaluation" and self._evaluates is not None and not self._evaluates.exists():
            self._evaluates.touch()
            select.select([int(os.environ[VERDICTS])], [], [], self._waits_s)

    def _all_are_there(self) -> bool:
        return dist.is_initialized() and dist.get_world_size() == self._size

    def note_more_points(self) -> None:
        """Have points where the code has none, from the third step on: "forward"; "in the sum", once it is begun.

        And "in the sum ahead": within a backward pass, when a first piece of it is on its way.
        """

        def reached(name: str) -> None:
            if self._passed.get("step", 0) >= 3:
                self.reached(name, {})

        def sum_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
            work = dist.all_reduce(tensor, group=group, async_op=True)
            reached("in the sum")
            collectives.wait_for(work)
            return tensor

        def finish(sums: SharedSums) -> None:
            reached("in the sum")
            finished(sums)

        def has_come(a_sum: SumAhead, *arguments: Any) -> None:
            received(a_sum, *arguments)
            if a_sum.num_sent:
                reached("in the sum ahead")

        finished, received = SharedSums.finish, SumAhead._has_come
        ahead._MOST_TOGETHER = {"cpu": 200}
        register_module_forward_hook(lambda *_: reached("forward"))
        collectives.sum_, SharedSums.finish = sum_, finish  # type: ignore[method-assign]
        SumAhead._has_come = has_come  # type: ignore[method-assign]

    @staticmethod
    def _send(number: int, after_s: float) -> None:
        if after_s:
            threading.Timer(after_s, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)


def train_through(run: Run) -> dict[str, Any]:
    """Train the small job of exact mode, with these losses; how it ended."""

    def work(rank: int) -> None:
        script = _Script(run, rank)
        faultpoints._armed = script  # type: ignore[assignment]
        if run.machines:
            shared_memory._machine = lambda: run.machines[rank % NEW]
        if any(point.startswith(("forward", "in the sum")) for point, *_ in run.signals):
            script.note_more_points()
        with Path(f"{run.folder}.newcomer").open("w") as newcomer:  # who has its lock has not ended
            while run.too_late and rank >= NEW and not Path(f"{run.folder}.evaluates").exists():
                time.sleep(0.01)
            if run.too_late and rank >= NEW:
                fcntl.flock(newcomer, fcntl.LOCK_EX)
            train(Path(run.folder), _MODEL, *run.overrides)
            if run.too_late and rank == 0:
                fcntl.flock(newcomer, fcntl.LOCK_EX)

    worker_module.Worker._start = staticmethod(_forking(work))  # type: ignore[assignment, method-assign]
    group = WorkerGroup((), run.size)
    with (
        workers_module.signals_heard() as signals,
        reserved_port() as port,
        workers_module._started(group, port) as (workers, replace),
    ):
        outcome = Watch(group, workers, signals, replace, port, run.most_losses).until_the_end()
    return {"exit_code": outcome.exit_code, "message": outcome.message}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for fields in json.loads(sys.argv[1]):
        print(json.dumps(train_through(Run(**fields))), flush=True)
