"""The test process's side of the fork server: start it once, ask it for workers, keep test files warm in it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from typing import IO, Any

from disttrain.testing.errors import HarnessError
from disttrain.testing.spec import Preload, WorkerSpec
from disttrain.testing.wire import Channel

_MOST_WARM = 3  # test files kept warm at a time: each costs some tens of MiB
_START = "import sys; sys.path[:] = {path!r}; from disttrain.testing.forkserver import main; main({fd})"


class Server:
    """A running fork server, as seen by its client. Safe to use from several threads."""

    def __init__(self, control: Channel, complaints: IO[bytes]) -> None:
        self._control = control
        self._complaints = complaints
        self._lock = threading.Lock()
        self._imported: set[str] = set()
        self.broken = False

    def first_word(self) -> Any:
        """The server's message once it is ready."""
        return self._receive()

    def fork_worker(self, spec: WorkerSpec, fds: list[int]) -> int:
        """Start a worker with these file descriptors; returns its process id."""
        return int(self._ask("worker", spec, fds))

    def fork_server(self, preload: Preload) -> Server | None:
        """A server with `preload` imported; None if that started threads, which no fork survives.

        Raises HarnessError if the import fails; the message has the traceback.
        """
        ours, theirs = Channel.pair()
        self._ask("server", preload, [theirs.fileno()])
        theirs.close()
        server = Server(ours, self._complaints)
        server._imported = set(self._imported)
        usable, problem = server.first_word()
        if not usable:
            server.close()
        if problem:
            raise HarnessError(f"the workers cannot import what they shall run:\n{problem}")
        return server if usable else None

    def import_late(self, names: set[str]) -> None:
        """Have the server import what workers were seen to import by themselves."""
        missing = names - self._imported
        if missing:
            self._ask("import", missing)
            self._imported |= missing

    def end(self, pids: set[int]) -> dict[int, int]:
        """Kill what is left of these workers and all they started; how each ended, as os.waitpid has it."""
        return dict(self._ask("end", pids))

    def status(self, pid: int) -> int | None:
        """How a worker ended that hung up; None if it lives."""
        return self._ask("status", pid)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Hang up, upon which the server ends its workers and itself."""
        self._control.close()

    def _ask(self, request: str, argument: object, fds: list[int] | None = None) -> Any:
        with self._lock:
            if self.broken:
                raise self._died()
            self.broken = (
                True  # if we are interrupted (Ctrl-C, a timeout's signal), the next caller would get this answer
            )
            try:
                self._control.send((request, argument), fds or [])
                answer = self._receive()
                self.broken = False
            except ConnectionError:
                raise self._died() from None
            finally:
                if self.broken:
                    self.close()
            return answer

    def _receive(self) -> Any:
        try:
            answer, _ = self._control.receive()
        except EOFError:
            raise self._died() from None
        return answer

    def _died(self) -> HarnessError:
        self._complaints.seek(0)
        said = self._complaints.read().decode(errors="replace").strip()
        return HarnessError(f"the fork server is gone; it said:\n{said}" if said else "the fork server is gone")


class Pool:
    """One fork server for this process, started when first needed, and its warm descendants."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._root: Server | None = None
        self._ready = False
        self._warm: OrderedDict[Preload, Server | HarnessError | None] = OrderedDict()
        self._complaints: IO[bytes] | None = None
        self._late: set[str] = set()

    def learn(self, late_imports: set[str]) -> None:
        """These modules were imported late by a worker: have them ready next time."""
        self._late |= late_imports

    @property
    def of_this_process(self) -> bool:
        """Whether this process made it, not one it was forked from."""
        return self._pid == os.getpid()

    def start(self) -> None:
        """Have the fork server import torch from now on; does not wait for it."""
        with self._lock:
            running = self._process is not None and self._process.poll() is None
            if running and self._root is not None and not self._root.broken:
                return
            self.close()
            ours, theirs = Channel.pair()
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
            command = _START.format(path=sys.path, fd=theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", command],  # type: ignore[attr-defined]
                stdin=subprocess.DEVNULL,
                stdout=self._complaints,
                stderr=self._complaints,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"GLIBC_TUNABLES": _tunables()},
                start_new_session=True,  # Ctrl-C is for the test process, which ends the workers
            )
            theirs.close()
            self._root = Server(ours, self._complaints)
            self._ready = False

    def server(self, preload: Preload | None = None) -> tuple[Server, bool]:
        """The server to fork workers from, and whether it has `preload` imported: if not, the worker has to.

        Raises HarnessError if the fork server cannot start or the import fails; the message has its output.
        """
        with self._lock:
            self.start()
            root = self._root
            assert root is not None
            if not self._ready:
                root.first_word()
                self._ready = True
            if preload is None or preload not in self._warm:
                root.import_late(self._late)
            if preload is None:
                return root, True
            known = self._warm.get(preload)
            if isinstance(known, Server) and known.broken:
                del self._warm[preload]
            if preload not in self._warm:
                while len(self._warm) >= _MOST_WARM:
                    self._let_go(self._warm.popitem(last=False)[1])
                try:
                    self._warm[preload] = root.fork_server(preload)
                except HarnessError as error:
                    self._warm[preload] = error  # it would fail again
            self._warm.move_to_end(preload)
            server = self._warm[preload]
            if isinstance(server, HarnessError):
                raise server
            if server is None:
                return root, False
            server.import_late(self._late)
            return server, True

    def forget(self, session: int) -> None:
        """Close the servers of a pytest session that is over."""
        with self._lock:
            for preload in [preload for preload in self._warm if getattr(preload, "session", None) == session]:
                self._let_go(self._warm.pop(preload))

    def _let_go(self, server: Server | HarnessError | None) -> None:
        if isinstance(server, Server):
            server.close()

    def close(self) -> None:
        """End the fork server and everything it started. The pool can be used again."""
        with self._lock:
            for server in (*self._warm.values(), self._root):
                self._let_go(server)
            self._warm.clear()
            self._root = None
            if self._process is not None:
                try:
                    self._process.wait(10)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
                self._process = None
            if self._complaints is not None:
                self._complaints.close()
                self._complaints = None


def _tunables() -> str:
    """Have malloc ask for huge pages as it goes: then few are left to be made of small ones, which takes 0.3 s."""
    own = os.environ.get("GLIBC_TUNABLES")
    return f"{own}:glibc.malloc.hugetlb=1" if own else "glibc.malloc.hugetlb=1"


@functools.cache
def _pool_of(pid: int) -> Pool:
    pool = Pool()
    atexit.register(_close_at_exit, pool)
    return pool


def _close_at_exit(pool: Pool) -> None:
    if pool.of_this_process:
        with contextlib.suppress(Exception):
            pool.close()


def default_pool() -> Pool:
    """The pool of this process (a forked process gets its own)."""
    return _pool_of(os.getpid())
