"""The process that imports torch once and forks warm workers from then on.

It must stay fork-safe: it never makes a process group, never runs a backward pass, and keeps torch and BLAS to one
thread. A server can fork a second server that imports a test module on top, so that workers find that warm as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import time
import traceback
import warnings
from typing import Any

from disttrain.testing import processes
from disttrain.testing.loading import load
from disttrain.testing.spec import LATE_IMPORTS, Preload, WorkerSpec
from disttrain.testing.wire import Channel

_KILL_ROUNDS = 50


class ForkServer:
    """Answers one request at a time until its client hangs up."""

    def __init__(self, control: Channel) -> None:
        self._control = control
        self._alive: set[int] = set()
        self._statuses: dict[int, int] = {}
        self.session: Any = None  # the pytest session, where a test file is preloaded

    def serve(self) -> None:
        """Fork what is asked for. Returns never in a server, and in a forked process only by exiting."""
        processes.adopt_orphans()
        try:
            while True:
                try:
                    (request, argument), fds = self._control.receive()
                except EOFError:
                    break
                self._sweep()
                self._control.send(getattr(self, f"_answer_{request}")(argument, fds))
        finally:
            self._end(set(self._alive))
        os._exit(0)

    def _answer_worker(self, spec: WorkerSpec, fds: list[int]) -> int:
        from disttrain.testing.worker import work

        pid = self._fork()
        if pid == 0:
            self._control.close()
            work(spec, fds, self.session)
        with contextlib.suppress(OSError):  # the child does it too: whichever comes first
            os.setpgid(pid, pid)
        for fd in fds:
            os.close(fd)
        return pid

    def _answer_server(self, preload: Preload, fds: list[int]) -> int:
        pid = self._fork()
        if pid == 0:
            self._control.close()
            self._control = Channel.from_fd(fds[0])
            self._alive.clear()
            self._control.send(self._preload(preload))
            self.serve()
        os.close(fds[0])
        return pid

    def _answer_import(self, names: set[str], fds: list[int]) -> None:
        """Import these modules for the workers to come."""
        for name in sorted(names & set(LATE_IMPORTS)):
            with contextlib.suppress(Exception):  # it worked in a worker; if not here, they keep doing it themselves
                importlib.import_module(name)
        _settle()

    def _answer_end(self, pids: set[int], fds: list[int]) -> dict[int, int]:
        """Kill these workers and whatever they started, and return how each ended (as os.waitpid does)."""
        self._end(pids)
        return {pid: self._statuses.pop(pid) for pid in pids if pid in self._statuses}

    def _answer_status(self, pid: int, fds: list[int]) -> int | None:
        """How a worker that hung up has ended; None if it lives on regardless."""
        deadline = time.monotonic() + 5.0
        while pid in self._alive and time.monotonic() < deadline:
            self._sweep()
            time.sleep(0.002)
        return self._statuses.get(pid)

    def _fork(self) -> int:
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's on threads: we look at them ourselves
            pid = os.fork()
        if pid == 0:
            processes.die_with_parent(parent)
        else:
            self._alive.add(pid)
        return pid

    def _sweep(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._alive:
                self._alive.discard(pid)
                self._statuses[pid] = status

    def _end(self, pids: set[int]) -> None:
        for pid in pids:
            processes.kill_group(pid)
        while self._alive & pids:
            self._sweep()
            time.sleep(0.001)
        # What the workers started and left behind is ours now: they were its parent, and we are theirs.
        for _ in range(_KILL_ROUNDS):
            orphans = processes.children() - self._alive
            if not orphans:
                break
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._sweep()
            time.sleep(0.001)

    def _preload(self, preload: Preload) -> tuple[bool, str]:
        """Import what was asked for. Returns whether workers can be forked from here, and if not, why."""
        try:
            self.session = load(preload)
        except BaseException:
            return False, traceback.format_exc()
        _settle()
        return processes.num_threads() == 1 and not _cuda_is_awake(), ""


def _settle() -> None:
    """Keep the garbage collector away from what is there: touching it after a fork would copy it."""
    gc.collect()
    gc.freeze()


def _cuda_is_awake() -> bool:
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def main(fd: int) -> None:
    """Import torch and serve on this file descriptor."""
    own = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS",)}
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or NumPy starts threads as it is imported
    import torch
    import torch.distributed as dist

    from disttrain.testing import trace, worker

    for name, value in own.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    torch.set_num_threads(1)
    torch.ones(1)  # the first tensor sets up the dispatcher: 10 ms that each worker would spend
    if dist.is_available():
        trace.install()
        worker.warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _settle()
    processes.use_huge_pages()
    control = Channel.from_fd(fd)
    control.send("ready")
    ForkServer(control).serve()
