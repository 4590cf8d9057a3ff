"""The workers of one group, seen from the test process: start them, give them a command, watch them, end them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from disttrain.testing import diagnosis, measuring, processes, stacks
from disttrain.testing.errors import HarnessError
from disttrain.testing.pool import Server
from disttrain.testing.spec import WorkerSpec
from disttrain.testing.wire import Channel

_POLL_S = 0.2
_GRACE_S = 2.0  # after a failure: for the others to fail too
_GRACE_IN_COLLECTIVE_S = 0.3  # the same, once every other rank waits in a collective
_STUCK_S = 1.0  # waiting this long for a call that no rank will make is a hang
_STACKS_S = 1.0


@dataclass(frozen=True)
class Reply:
    """What came of one command in one rank: `kind` is value, error, report, died or hung."""

    rank: int
    kind: str
    content: Mapping[str, Any]
    time: float = field(default_factory=time.monotonic)

    @property
    def failed(self) -> bool:
        """Whether the rank did not do what it was asked to."""
        return self.kind in ("error", "died", "hung") or (self.kind == "report" and self.content["outcome"] == "failed")


class Worker:
    """One worker process and the files it writes to."""

    def __init__(self, server: Server, spec: WorkerSpec, outputs: tuple[int, int], listen: int | None) -> None:
        self.rank = spec.rank
        self._trace: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by close()
        self._stacks: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.channel, theirs = Channel.pair()
        fds = [theirs.fileno(), *outputs, self._trace.fileno(), self._stacks.fileno()]
        self.pid = server.fork_worker(spec, fds if listen is None else [*fds, listen])
        theirs.close()

    def history(self) -> diagnosis.History:
        """What this rank called of torch.distributed so far."""
        return diagnosis.read_history(_whole(self._trace))

    def trace_size(self) -> int:
        """Grows with each call and each return."""
        return os.fstat(self._trace.fileno()).st_size

    def ask_for_stacks(self) -> int:
        """Have the worker write its stacks; returns where in the file they will start."""
        start = os.fstat(self._stacks.fileno()).st_size
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, processes.STACKS_SIGNAL)
        return start

    def stacks_from(self, start: int) -> str:
        """What the worker wrote since `start`: upon our request, or as it crashed."""
        return _whole(self._stacks)[start:].decode(errors="replace")

    def is_stopped(self) -> bool:
        """Whether a signal stopped it (SIGSTOP)."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "Tt"
        return False

    def close(self) -> None:
        """Hang up, and drop what it wrote."""
        for resource in (self.channel, self._trace, self._stacks):
            resource.close()


class Crew:
    """The workers of a group. Once one of them has died or hung, the crew is spent."""

    def __init__(
        self, server: Server, specs: Sequence[WorkerSpec], outputs: Sequence[tuple[int, int]], listen: int | None
    ):
        self._server = server
        self.workers: list[Worker] = []
        self.late_imports: set[str] = set()
        self.spent = False
        self._closed = False
        try:
            for spec, streams in zip(specs, outputs, strict=True):
                self.workers.append(Worker(server, spec, streams, listen if spec.rank == 0 else None))
        except BaseException:
            self.close()
            raise

    def command(
        self, command: str, arguments: Sequence[Any], timeout_s: float, patient: bool = False
    ) -> tuple[list[Reply], str | None]:
        """Command each rank, and wait for all. Returns the replies by rank, and why the wait was cut short, if it was.

        It ends early when a rank failed and the others only wait for it, or when they wait for a call that no rank will
        make. With `patient`, nothing but the timeout ends it: the survivors of a killed rank may have things to do.
        """
        if self._closed:
            raise HarnessError("this group is closed: its `with workers(...)` block has ended; run it inside the block")
        if self.spent:
            raise HarnessError("a worker of this group has died or hung before; make a new group with `workers(...)`")
        self.spent = True  # unless every rank answers; also if we are interrupted
        wanted = measuring.wanted()
        for worker, argument in zip(self.workers, arguments, strict=True):
            with contextlib.suppress(OSError):  # it died: the wait finds out
                worker.channel.send((command, argument, wanted))
        replies, reason = self._wait(time.monotonic() + timeout_s, timeout_s, patient)
        pending = [worker for worker in self.workers if worker.rank not in replies]
        if pending:
            replies.update(_look_at(pending))
        self.spent = any(reply.kind in ("died", "hung") for reply in replies.values())
        return [replies[rank] for rank in sorted(replies)], reason

    def _wait(self, deadline: float, timeout_s: float, patient: bool) -> tuple[dict[int, Reply], str | None]:
        replies: dict[int, Reply] = {}
        pending = {worker.channel.fileno(): worker for worker in self.workers}
        failed_at: float | None = None
        sizes, still_since = -1, time.monotonic()
        while pending:
            now = time.monotonic()
            if now >= deadline:
                return replies, f"not done after {timeout_s:g} s"
            ready, _, _ = select.select(list(pending), [], [], min(_POLL_S, deadline - now))
            for fd in ready:
                reply = self._receive(pending.pop(fd))
                replies[reply.rank] = reply
                if reply.failed and failed_at is None:
                    failed_at = time.monotonic()
            if ready or patient or not pending:
                continue
            now, size = time.monotonic(), sum(worker.trace_size() for worker in self.workers)
            if size != sizes:
                sizes, still_since = size, now
            still_s = now - still_since
            if failed_at is not None:
                waiting = all(worker.history().inside for worker in pending.values())
                if now - failed_at > (_GRACE_IN_COLLECTIVE_S if waiting else _GRACE_S):
                    return replies, "the others cannot continue without a rank that failed"
            elif still_s > _STUCK_S:
                histories = self.histories()
                ranks = {worker.rank for worker in pending.values()}
                if diagnosis.never_to_return(histories, ranks, set(replies)):
                    return replies, "stuck in a collective that a rank which is done never called"
                if diagnosis.first_difference(histories, incomplete=False) and all(histories[r].inside for r in ranks):
                    return replies, "stuck in collectives that do not match"
        return replies, None

    def _receive(self, worker: Worker) -> Reply:
        try:
            content, _ = worker.channel.receive()
        except EOFError:
            status = self._server.status(worker.pid)
            return Reply(worker.rank, "died", {"status": status, "stacks": worker.stacks_from(0)})
        self.late_imports.update(content["late_imports"])
        measuring.add(content["measured"])
        return Reply(worker.rank, content["kind"], content)

    def histories(self) -> dict[int, diagnosis.History]:
        """What each rank called of torch.distributed so far."""
        return {worker.rank: worker.history() for worker in self.workers}

    def close(self) -> None:
        """End every worker and whatever it started, and wait until they are gone."""
        self.spent = self._closed = True
        with contextlib.suppress(HarnessError):  # the server is gone, and with it its workers
            self._server.end({worker.pid for worker in self.workers})
        for worker in self.workers:
            worker.close()


def _look_at(pending: Sequence[Worker]) -> dict[int, Reply]:
    """Where the ranks are that have not answered."""
    starts = {worker.rank: worker.ask_for_stacks() for worker in pending if not worker.is_stopped()}
    deadline = time.monotonic() + _STACKS_S
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if all(len(worker.stacks_from(starts[worker.rank])) > 0 for worker in pending if worker.rank in starts):
            time.sleep(0.03)  # for the last lines
            break
    replies = {}
    for worker in pending:
        stopped = worker.rank not in starts
        text = "" if stopped else worker.stacks_from(starts[worker.rank])
        content = {"stopped": stopped, "answered": bool(text), "stacks": stacks.parse(text)}
        replies[worker.rank] = Reply(worker.rank, "hung", content)
    return replies


def _whole(file: IO[bytes]) -> bytes:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def listening_socket() -> socket.socket:
    """A socket that already listens, on a free port of loopback: no other process can take the port in between."""
    listening = socket.socket()
    # Without it, a port that is left in TIME_WAIT could not be listened on by its number either.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    listening.listen(512)
    return listening
