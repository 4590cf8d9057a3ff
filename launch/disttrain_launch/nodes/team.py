"""The machines of a run, as the one sees them that leads it: it is where all of them meet."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from disttrain.distributed.requests import STOP_SIGNALS
from disttrain.errors import DisttrainError, ExitCode
from disttrain_launch.local.worker import Member, Worker
from disttrain_launch.messages import complain
from disttrain_launch.nodes.agreement import why_not_together
from disttrain_launch.nodes.machine import Machine, Place
from disttrain_launch.nodes.node import JOIN_S, Node
from disttrain_launch.nodes.remote import RemoteMachine
from disttrain_launch.nodes.wire import BEAT_EVERY_S, GONE_AFTER_S, Gone, Wire, listener_at
from disttrain_launch.outcome import Outcome

_LAST_CALL_S = 5.0  # once the fewest machines are there, how long to wait for more
_PAUSED_S = 3.0  # between two looks: this process stood still, and so nobody was heard
_TO_SAY_GOODBYE_S = 5.0
_NO_PLACE = "the run has no place for this machine now; it waits here until there is one, or the run ends"
_TOO_LATE = (
    'the run began without this machine, and nobody joins it where parallel.on_lost_worker is "stop": there is nothing '
    "to do here until it is started again"
)
_MOST_GREETINGS = 64  # connections that have not said what they are


class Stopped(Exception):
    """A request to stop came before the workers were started."""


class Team:
    """This machine and those that have connected.

    Args:
        signals: a descriptor that gives the number of each signal received.
        most_workers: as many as can share a step.
    """

    def __init__(self, node: Node, machine: Machine, signals: int, most_workers: float) -> None:
        self._node, self._here, self._signals, self._most_workers = node, machine, signals, most_workers
        self._machines: list[RemoteMachine] = []
        self._strangers: list[Wire] = []
        self._at: dict[Member, tuple[Machine | RemoteMachine, Place]] = {}
        self._requests = b""
        self._refused: set[str] = set()  # what was said of those that cannot take part
        self._looked_at = time.monotonic()
        self._listener = listener_at(node.host, node.port)

    def close(self) -> None:
        """Let go of all machines."""
        self._listener.close()
        for wire in (*self._strangers, *(machine.wire for machine in self._machines)):
            wire.close()

    def say(self, message: str) -> None:
        """A message for the users of all machines."""
        complain(message)
        for machine in self._machines:
            machine.wire.send(say=message)

    def end(self, outcome: Outcome) -> None:
        """Inform the other machines how the run has ended, and wait until they know."""
        for machine in self._machines:
            machine.wire.send(end=int(outcome.exit_code), message=outcome.message, traceback=outcome.traceback)
        deadline = time.monotonic() + _TO_SAY_GOODBYE_S
        while self._machines and time.monotonic() < deadline:
            self.pump(0.1)

    def pump(self, timeout_s: float) -> bytes:
        """Handle what comes from all machines, for so long at most; return the signals that came, here or there."""
        wires = [*self._strangers, *(machine.wire for machine in self._machines)]
        readable: list[Any] = [self._signals, self._listener, *(wire for wire in wires if wire.is_open)]
        ready, _, _ = select.select(readable, [], [], min(timeout_s, BEAT_EVERY_S))
        if time.monotonic() - self._looked_at > _PAUSED_S:
            for wire in wires:
                wire.heard_at = time.monotonic()
        if self._listener in ready:
            self._greet()
        for wire in self._strangers[:]:
            self._hear_stranger(wire)
        for machine in self._machines[:]:
            self._hear(machine)
        heard, self._requests = self._requests, b""
        self._looked_at = time.monotonic()
        return heard + (os.read(self._signals, 4096) if self._signals in ready else b"")

    def _greet(self) -> None:
        try:
            connection, _ = self._listener.accept()
            self._strangers.append(Wire(connection))
        except OSError:  # it has gone already
            return
        if len(self._strangers) > _MOST_GREETINGS:
            self._strangers.pop(0).close()

    def _hear_stranger(self, wire: Wire) -> None:
        try:
            if messages := wire.received():
                self._strangers.remove(wire)
                self._admit(wire, *messages)
        except (Gone, AttributeError, KeyError, TypeError, ValueError):
            wire.close()
            if wire in self._strangers:
                self._strangers.remove(wire)
            if wire.is_of_torchrun:
                self._refuse(wire, wire.peer, {"restarts": True, "version": self._node.terms["version"]})

    def _admit(self, wire: Wire, hello: dict[str, Any], *more: dict[str, Any]) -> None:
        if hello.get("job") != self._node.job_id:
            message = "another job meets there: give the same --job-id on all machines, or another port"
            wire.send(end=1, message=message, traceback=None)
            wire.close()
        elif not self._refuse(wire, str(hello["host"]), hello):
            self._machines.append(RemoteMachine(wire, hello, self._pump_for_later))
            wire.send(leads=self._node.terms["version"], echo=hello["beat"])
            for one in more:
                self._take(self._machines[-1], one)

    def _refuse(self, wire: Wire, name: str, terms: dict[str, Any]) -> bool:
        """Whether a machine cannot take part, for what it says of itself: it is informed, and so is the user here."""
        why = why_not_together(self._node.terms, terms)
        if why is None:
            return False
        words = f"{name} cannot take part: {why}. Give all machines the same recipe, options and version of disttrain."
        if words not in self._refused:
            self._refused.add(words)
            complain(words)
        wire.send(end=int(ExitCode.CONFIGURATION), message=words, traceback=None)
        wire.close()
        return True

    def _pump_for_later(self, timeout_s: float) -> None:
        heard = self.pump(timeout_s)  # first: it takes those that are there already
        self._requests += heard

    def _hear(self, machine: RemoteMachine) -> None:
        try:
            for message in machine.wire.received():
                self._take(machine, message)
        except (Gone, KeyError, TypeError, ValueError):
            machine.lose("its connection is closed")
        if machine.is_there and machine.is_silent():
            machine.lose(f"no sign of life for {GONE_AFTER_S:.0f} s")
        if not machine.is_there:
            self._machines.remove(machine)

    def _take(self, machine: RemoteMachine, message: dict[str, Any]) -> None:
        # Once a run is under way, a machine without a worker in it only speaks for itself: it ends.
        if message.get("stop") in STOP_SIGNALS and (not self._at or not self._is_idle(machine)):
            self._requests += bytes([message["stop"]])
        machine.take(message)

    def assembled(self) -> list[Member]:
        """Started workers on all machines, once enough are there. Raises DisttrainError, or Stopped."""
        least, most = self._node.nodes
        deadline, last_call = time.monotonic() + JOIN_S, None
        while len(self._machines) + 1 < most:
            now = time.monotonic()
            if len(self._machines) + 1 >= least:
                last_call = last_call or now + _LAST_CALL_S
                if now >= last_call:
                    break
            elif now > deadline:
                raise DisttrainError(
                    f"job {self._node.job_id!r}: at least {least} nodes must join within {JOIN_S:.0f} s, and "
                    f"{len(self._machines) + 1} have."
                )
            if any(number in STOP_SIGNALS for number in self.pump(0.1)):
                raise Stopped
        taking_part: list[Machine | RemoteMachine] = []
        there: list[Machine | RemoteMachine] = [self._here, *self._machines]
        for machine in there[:most]:
            if sum(one.capacity for one in taking_part) + machine.capacity <= self._most_workers or not taking_part:
                taking_part.append(machine)
                machine.is_fit = True
        size, port = sum(machine.capacity for machine in taking_part), self._here.take_port()
        workers: list[Member] = []
        for slot, machine in enumerate(taking_part):
            for local_rank in range(machine.capacity):
                place = Place(
                    rank=len(workers),
                    local_rank=local_rank,
                    size=size,
                    local_size=machine.capacity,
                    host=self._here.address,
                    port=port,
                    slot=slot,
                    num_slots=most,
                )
                workers.append(self._start(machine, place))
        return workers

    def dismiss_all(self) -> None:
        """End all workers, and have their machines let go of them."""
        for worker in list(self._at):
            worker.kill()
            self._let_go(worker)
        self._here.clear()

    def replacement(self, dead: Member) -> Member | None:
        """Another worker in the place of one that has ended, if its machine is still there."""
        machine, place = self._at[dead]
        self._let_go(dead)
        if isinstance(machine, RemoteMachine) and not machine.is_there:
            return None
        return self._start(machine, replace(place, joins=True))

    def newcomers(self, members: Sequence[Member]) -> list[Member]:
        """Started workers on machines that have come, as far as there is room for them beside these."""
        new: list[Member] = []
        for machine in self._machines:
            taken = {place.slot for _, place in self._at.values()}
            free = [slot for slot in range(self._node.nodes[1]) if slot not in taken]
            size = len(members) + len(new) + machine.capacity
            if not self._is_idle(machine) or not machine.is_fit:
                continue
            if not free or size > self._most_workers:
                machine.say_once(_NO_PLACE)
                continue
            example = next(iter(self._at.values()))[1]
            for local_rank in range(machine.capacity):
                ranks = {place.rank for _, place in self._at.values()}
                rank = next(rank for rank in range(len(ranks) + 1) if rank not in ranks)
                place = replace(
                    example,
                    rank=rank,
                    local_rank=local_rank,
                    size=max(size, rank + 1),
                    local_size=machine.capacity,
                    slot=free[0],
                    joins=True,
                )
                new.append(self._start(machine, place))
        return new

    def dismiss_idle(self) -> None:
        """End the part of machines without a worker, where none is to join."""
        for machine in self._machines:
            if self._is_idle(machine):
                machine.wire.send(end=int(ExitCode.DONE), message=_TOO_LATE, traceback=None)
                machine.wire.close()

    def _is_idle(self, machine: Machine | RemoteMachine) -> bool:
        return not any(machine is other for other, _ in self._at.values())

    def meeting_place(self, leader: Member) -> tuple[str, int]:
        """Where this worker can meet the others."""
        machine, _ = self._at[leader]
        return machine.address, machine.take_port()

    def local_place(self, worker: Member, members: Sequence[Member]) -> tuple[int, int]:
        """(local rank, local size) of a worker among these."""
        here = [one for one in members if self._at[one][0] is self._at[worker][0]]
        return here.index(worker), len(here)

    def num_losses(self, dead: Sequence[Member]) -> int:
        """How many losses these are, which were not replaced yet: of a machine that is lost, all are one."""
        machines = [self._at[worker][0] for worker in dead]
        gone = {machine for machine in machines if isinstance(machine, RemoteMachine) and not machine.is_there}
        return len(gone) + sum(machine not in gone for machine in machines)

    def forget(self, worker: Member) -> None:
        """A worker that failed to join takes up no place any more, and its machine is not asked for another one."""
        if worker in self._at:  # else its machine is lost
            self._at[worker][0].is_fit = False  # or it would start one after the other
            self._let_go(worker)

    def _start(self, machine: Machine | RemoteMachine, place: Place) -> Member:
        worker = machine.start(place)
        self._at[worker] = machine, place
        return worker

    def _let_go(self, worker: Member) -> None:
        found = self._at.pop(worker, None)
        if found is not None and isinstance(found[0], Machine):
            assert isinstance(worker, Worker)
            found[0].drop(worker)
        elif found is not None:
            worker.close()
