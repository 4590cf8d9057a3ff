"""A machine of a run that another one leads: it starts workers when asked to, and reports what becomes of them."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from disttrain.distributed.ending import Report
from disttrain.distributed.lease import now
from disttrain.distributed.requests import STOP_SIGNALS, asking
from disttrain.distributed.suspended import Suspended
from disttrain.distributed.verdicts import Verdict
from disttrain.errors import ConfigurationError, DisttrainError, ExitCode
from disttrain_launch.local.worker import Worker
from disttrain_launch.messages import complain
from disttrain_launch.nodes.machine import Machine, Place
from disttrain_launch.nodes.node import JOIN_S, Node
from disttrain_launch.nodes.remote import told_of
from disttrain_launch.nodes.wire import LEASE_S, Gone, Wire, is_store_at
from disttrain_launch.outcome import LocalEnding, Outcome

_LOOK_EVERY_S = 0.05
_TO_CONNECT_S = 5.0
_AGAIN_AFTER_S = 1.0
_GIVE_THE_SAME = "give all machines the same recipe, options and version of disttrain"
TOO_EARLY = "stopped before the workers were ready; run the same command again"


class Follower:
    """This machine's part.

    Args:
        signals: a descriptor that gives the number of each signal received.
        is_finished: whether the run has been trained to its end, as far as can be seen from here.
    """

    def __init__(self, node: Node, machine: Machine, signals: int, is_finished: Callable[[], bool]) -> None:
        self._node, self._machine, self._signals, self._is_finished = node, machine, signals, is_finished
        self._workers: dict[int, Worker] = {}
        self._told: dict[int, dict[str, object]] = {}
        self._lease = machine.leased()
        self._unread: list[dict[str, Any]] = []  # messages that came with the greeting
        self._suspended = Suspended()
        self._was_asked_to_stop = False

    def until_the_end(self) -> Outcome:
        """Take part until the run has ended. Raises DisttrainError if nobody leads it."""
        while True:
            wire = self._connected()
            if isinstance(wire, Outcome):
                return wire
            try:
                return self._serve(wire)
            except Gone:
                has_begun = bool(self._workers)
                # Before anything else: another machine's worker may have the place of one of these by now.
                self._machine.clear()
                self._workers, self._told = {}, {}
                wire.close()
            where = f"{self._node.host}:{self._node.port}"
            if self._was_asked_to_stop:
                return Outcome(ExitCode.FAILURE, f"lost the connection to {where} while the workers were asked to stop")
            if has_begun and self._node.stops:
                words = 'the workers here are ended, as the recipe has parallel.on_lost_worker = "stop"'
                return Outcome(ExitCode.LOST, f"lost the connection to {where}: {words}")
            complain(f"lost the connection to {where}: the workers here are ended, and join again when it is back")

    def _connected(self) -> Wire | Outcome:
        """A connection to the leading machine, or how it ends without."""
        node, deadline = self._node, time.monotonic() + JOIN_S
        while True:
            if any(number in STOP_SIGNALS for number in self._heard(0.0)):
                return Outcome(ExitCode.STOPPED, TOO_EARLY)
            if self._is_finished():
                return Outcome(ExitCode.DONE, f"{node.run_dir} is already finished: there is nothing left to do")
            try:
                return self._greeted(Wire(socket.create_connection((node.host, node.port), _TO_CONNECT_S)))
            except (OSError, Gone) as error:
                where = f"{node.host}:{node.port}"
                if isinstance(error, Gone) and is_store_at(node.host, node.port):
                    raise ConfigurationError(
                        f"job {node.job_id!r}: the machine at {where} has all workers restart after a loss, and this "
                        f"one has the others continue (parallel.on_lost_worker): {_GIVE_THE_SAME}."
                    ) from None
                if time.monotonic() > deadline:
                    why = "no machine there leads" if isinstance(error, Gone) else error.strerror or error
                    raise DisttrainError(
                        f"job {node.job_id!r}: the nodes cannot find each other at {where} ({why}). The node with "
                        "--node-rank 0 must serve that address."
                    ) from error
            self._heard(_AGAIN_AFTER_S, keeps=True)

    def _greeted(self, wire: Wire) -> Wire | Outcome:
        """The connection, once the other end leads this machine; or how it ends, if that refuses it.

        Raises Gone, also if it has not answered in time or a signal has come.
        """
        machine = self._machine
        wire.send(
            job=self._node.job_id,
            host=machine.name,
            address=machine.address,
            workers=machine.capacity,
            ports=machine.spare_ports,
            beat=now(),
            **self._node.terms,
        )
        messages: list[dict[str, Any]] = []
        while not messages and wire.is_open and time.monotonic() - wire.heard_at < LEASE_S:
            sources: list[Any] = [wire, self._signals]
            ready, _, _ = select.select(sources, [], [], _AGAIN_AFTER_S)
            if self._signals in ready:
                break
            messages = wire.received()
        if not messages:
            wire.close()
            raise Gone
        if "end" in messages[0]:
            wire.close()
            return _end_of(messages[0])
        if "leads" not in messages[0]:
            wire.close()
            where = f"{self._node.host}:{self._node.port}"
            raise ConfigurationError(f"the machine at {where} has another version of disttrain: {_GIVE_THE_SAME}.")
        self._unread = messages
        return wire

    def _heard(self, timeout_s: float, *, keeps: bool = False) -> bytes:
        """The signals that have come; those that it `keeps` are there the next time, too."""
        ready, _, _ = select.select([self._signals], [], [], timeout_s)
        return os.read(self._signals, 4096) if ready and not keeps else b""

    def _serve(self, wire: Wire) -> Outcome:
        """Do what the leading machine says until the end that it announces. Raises Gone."""
        while True:
            if not wire.is_open:  # it closed with the last message, or when this end sent one
                raise Gone
            sources: list[Any] = [wire, self._signals]
            select.select(sources, [], [], 0.0 if self._unread else _LOOK_EVERY_S if self._workers else 1.0)
            # Before anything is read: what stands there may have been sent long ago, to who stood still meanwhile.
            if self._lease.is_over if self._workers else time.monotonic() - wire.heard_at > LEASE_S:
                raise Gone
            for number in self._heard(0.0):
                if number in STOP_SIGNALS:
                    if not self._was_asked_to_stop:
                        complain(asking(number))
                    self._was_asked_to_stop = True
                    wire.send(stop=number)
                    if not self._workers:  # the others continue, if they have begun
                        return Outcome(ExitCode.STOPPED, TOO_EARLY)
            messages, self._unread = self._unread, []
            for message in messages or wire.received():
                try:
                    end = self._obey(wire, message)
                except (KeyError, TypeError, ValueError):
                    raise Gone from None
                if end is not None:
                    wire.close()
                    return end
            self._report(wire)
            wire.beat()

    def _obey(self, wire: Wire, message: dict[str, Any]) -> Outcome | None:
        if "end" in message:
            return _end_of(message)
        if "echo" in message:
            self._lease.extend(min(float(message["echo"]), now()) + LEASE_S)
        if "say" in message:
            complain(str(message["say"]))
        if "start" in message:
            self._start(wire, int(message["start"]), Place.of(message["place"]))
        worker = self._workers.get(message.get("to", 0))
        if worker is None:
            return None
        if "verdict" in message:
            verdict = Verdict.of(message["verdict"])
            if verdict.rank == 0 and verdict.port in self._machine.spare_ports:
                self._machine.take_port(verdict.port)
                wire.send(port=self._machine.spare_ports[-1])
            worker.hear(verdict)
        match message.get("do"):
            case "terminate":
                worker.terminate()
            case "shoot":
                worker.shoot()
            case "kill":
                worker.kill()
            case "close":
                del self._workers[message["to"]]
                self._told.pop(message["to"], None)
                self._machine.drop(worker)
        return None

    def _start(self, wire: Wire, number: int, place: Place) -> None:
        try:
            self._workers[number] = self._machine.start(place)
        except OSError as error:  # no process or file is to be had: the workers that are here need not end for it
            why = Report(f"it could not be started: {error}", self._machine.name, time.time(), None)
            ending = LocalEnding(place.rank, ExitCode.FAILURE, why.time, why, False, None, "", why.host)
            wire.send(of=number, ended=told_of(ending))

    def _report(self, wire: Wire) -> None:
        for number, worker in self._workers.items():
            told = self._told.get(number)
            if told is not None and "ended" in told:
                continue
            if worker.has_ended():
                assert worker.ending is not None
                news: dict[str, object] = {"ended": told_of(replace(worker.ending, host=self._machine.name))}
            else:
                news = {"says": worker.said()}
            if news != told:
                self._told[number] = news
                wire.send(of=number, **news)
        running = {worker.rank: worker.pid for worker in self._workers.values() if worker.ending is None}
        for line in self._suspended.news(running):
            complain(line)


def _end_of(message: dict[str, Any]) -> Outcome:
    return Outcome(int(message["end"]), str(message["message"]), message["traceback"])
