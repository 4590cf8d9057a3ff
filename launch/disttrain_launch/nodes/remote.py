"""Another machine of a run, and its workers, as the leading machine sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from disttrain.distributed.ending import Report
from disttrain.distributed.verdicts import Verdict
from disttrain.errors import ExitCode
from disttrain_launch.local.worker import Member
from disttrain_launch.nodes.machine import Place
from disttrain_launch.nodes.wire import GONE_AFTER_S, Wire
from disttrain_launch.outcome import LocalEnding

_TO_DIE_S = 10.0


class RemoteWorker(Member):
    """A worker of another machine."""

    def __init__(self, machine: RemoteMachine, number: int, rank: int) -> None:
        super().__init__(rank)
        self._machine, self._number = machine, number
        self._said: dict[str, Any] = {}

    @property
    def pid(self) -> None:
        """Its own launcher looks after its process."""
        return None

    def has_ended(self) -> bool:
        """Whether it has ended, or its machine is lost."""
        return self.ending is not None

    def hear(self, verdict: Verdict) -> None:
        """Send it a verdict."""
        self._tell(verdict=verdict.line().decode())

    def terminate(self) -> None:
        """Ask it to end."""
        self._tell(do="terminate")

    def shoot(self) -> None:
        """Kill it, and let its death count as one that has no cause in the others."""
        self.was_shot = True
        self._tell(do="shoot")

    def kill(self) -> None:
        """End it and its children, and wait until it has ended, or its machine is lost."""
        if not self.has_ended():
            self._tell(do="kill")
            self._machine.wait_until(self.has_ended, _TO_DIE_S)

    def close(self) -> None:
        """Have its machine let go of it."""
        self._machine.forget(self._number)

    def take(self, message: dict[str, Any]) -> None:
        """Take in what its machine reports of it."""
        if isinstance(message.get("says"), dict):
            self._said = message["says"]
        if isinstance(message.get("ended"), dict):
            # By the clock here: other machines' may differ, and the time of a loss is compared with others.
            self.end(replace(ending_of(message["ended"]), time=time.time()))

    def end(self, ending: LocalEnding) -> None:
        """Note how it ended."""
        if self.ending is None:
            self.ending, self.was_killed = ending, ending.code < 0

    def _tell(self, **message: Any) -> None:
        self._machine.wire.send(to=self._number, **message)

    def _says(self, what: str) -> object:
        return self._said.get(what)


class RemoteMachine:
    """A machine that has connected.

    Args:
        hello: its first message.
        pump: handles what comes from all machines, for some seconds at most.
    """

    def __init__(self, wire: Wire, hello: dict[str, Any], pump: Callable[[float], object]) -> None:
        self.wire, self._pump = wire, pump
        self.name, self.address = str(hello["host"]), str(hello["address"])
        self.capacity = int(hello["workers"])
        self._ports = [int(port) for port in hello["ports"]]
        self._workers: dict[int, RemoteWorker] = {}
        self._numbers = 0
        self._has_been_told: set[str] = set()
        self.is_there = self.is_fit = True
        """Whether it is connected; and whether workers may join from it, see `Team.forget`."""

    def start(self, place: Place) -> RemoteWorker:
        """A worker at this place."""
        self._numbers += 1
        worker = RemoteWorker(self, self._numbers, place.rank)
        self._workers[self._numbers] = worker
        self.wire.send(start=self._numbers, place=place.fields())
        return worker

    def say_once(self, message: str) -> None:
        """A message for the users of that machine, the first time."""
        if message not in self._has_been_told:
            self._has_been_told.add(message)
            self.wire.send(say=message)

    def forget(self, number: int) -> None:
        """Have the machine end and forget a worker."""
        if self._workers.pop(number, None) is not None:
            self.wire.send(to=number, do="close")

    def take_port(self) -> int:
        """A port there at which nobody listens."""
        return self._ports.pop(0) if len(self._ports) > 1 else self._ports[0]

    def take(self, message: dict[str, Any]) -> None:
        """Take in a message that is about it, or one of its workers."""
        if isinstance(message.get("beat"), int | float):
            self.wire.send(echo=message["beat"])
        if isinstance(message.get("port"), int):
            self._ports.append(message["port"])
        worker = self._workers.get(message.get("of", 0))
        if worker is not None:
            worker.take(message)

    def is_silent(self) -> bool:
        """Whether it has given no sign of life for longer than its workers may live without one from here."""
        return time.monotonic() - self.wire.heard_at > GONE_AFTER_S

    def lose(self, why: str) -> None:
        """Take it for lost, and its workers with it: they end by themselves, see `wire.LEASE_S`."""
        self.is_there = False
        self.wire.close()
        now = time.time()
        for worker in self._workers.values():
            if worker.ending is None:
                report = Report(f"its machine is lost: {why}", self.name, now, None)
                code, host = ExitCode.FAILURE, self.name
                worker.end(LocalEnding(worker.rank, code, now, report, False, None, "", host, is_of_lost_machine=True))
                worker.was_killed = True

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for what its messages bring about."""
        deadline = time.monotonic() + timeout_s
        while self.is_there and not condition() and time.monotonic() < deadline:
            self._pump(0.1)


def told_of(ending: LocalEnding) -> dict[str, Any]:
    """How a worker ended, for a message."""
    report = asdict(ending.report) if ending.report is not None else None
    return {
        "rank": ending.rank, "code": ending.code, "time": ending.time, "asked": ending.asked, "report": report,
        "last_words": ending.last_words, "host": ending.host,
    }  # fmt: skip


def ending_of(fields: dict[str, Any]) -> LocalEnding:
    """How a worker of another machine ended, from a message."""
    report = Report(**fields["report"]) if fields["report"] is not None else None
    return LocalEnding(**fields | {"report": report, "log": None})
