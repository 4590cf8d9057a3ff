"""A run on several machines that continues without those that are lost: the protocol, with workers that do nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from disttrain.agent import led as agents_look
from disttrain.agent.led import refusal_at
from disttrain.distributed.ports import reserved_port
from disttrain.errors import DisttrainError
from disttrain_launch.local import watch as watch_module
from disttrain_launch.nodes import follower as follower_module
from disttrain_launch.nodes import team as team_module
from disttrain_launch.nodes import together
from disttrain_launch.nodes.follower import Follower
from disttrain_launch.nodes.machine import Machine, Place
from disttrain_launch.nodes.node import Node
from disttrain_launch.nodes.remote import RemoteMachine, told_of
from disttrain_launch.nodes.team import Team
from disttrain_launch.nodes.wire import TO_A_STORE, Gone, Wire
from disttrain_launch.outcome import LocalEnding, Outcome

# Says that it is ready (unless there is a file "stops"), or waits to join, notes its verdicts, and finishes once there
# is a file "go". Once there is a file "through" it says so; or fails, if it was to join.
WORKER = """
import json, os, select, sys, time
report, verdicts = os.environ["TORCHELASTIC_ERROR_FILE"], int(os.environ["DISTTRAIN_VERDICTS"])
def say(**words):
    with open(report, "w") as file:
        file.write(json.dumps(words))
pid = os.getpid()
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR DISTTRAIN_NODE_SLOT DISTTRAIN_JOINS".split()
sources = {"model": open("model").read()} if os.path.exists("model") else {}
if os.environ["DISTTRAIN_JOINS"] and os.path.exists("refuse"):
    sys.exit(3)
joins = bool(os.environ["DISTTRAIN_JOINS"])
say(ready=not os.path.exists("stops"), leads=not joins, joins=joins, sources=sources)
with open(f"{pid}.new", "w") as file:
    file.write(json.dumps({name: os.environ[name] for name in names}))
os.rename(f"{pid}.new", f"{pid}.started")
while not os.path.exists("go"):
    if not joins and os.path.exists("through") and not os.path.exists("late"):
        say(through=True)
        open("late", "w").close()
    elif joins and os.path.exists("late"):
        sys.exit(4)
    if select.select([verdicts], [], [], 0.02)[0]:
        lines = os.read(verdicts, 65536)
        if not lines:
            sys.exit(1)
        with open(f"{pid}.verdicts", "ab") as file:
            file.write(lines)
        say(ready=True, leads=True, joins=joins and os.path.exists("slow"), sources=sources)
say(exit_code=0, message="finished", time=time.time())
"""
STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
PATIENCE_S = 120.0


TERMS = {"version": "1.0", "sources": "abc", "recipe": {"optim": {"lr": 0.1}, "data": {"root": "/here"}}}


def node(
    port: int,
    folder: Path,
    *,
    serves: bool,
    job: str = "one",
    nodes: tuple[int, int] = (2, 3),
    terms: dict[str, Any] | None = None,
) -> Node:
    return Node(
        arguments=(str(folder / "worker.py"),),
        nodes=nodes,
        host="127.0.0.1",
        port=port,
        workers=1,
        run_dir=str(folder / "run"),
        serves=serves,
        address="127.0.0.1",
        max_restarts=5,
        job_id=job,
        grace_s=60,
        recipe="digits",
        overrides=(),
        continues=True,
        stops=(folder / "stops").exists(),
        max_losses=10,
        most_workers=2,
        terms=TERMS if terms is None else terms,
    )


class Followers:
    """Machines that follow, each on a thread."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder = port, folder
        self.outcomes: list[Outcome] = []
        self.threads: list[threading.Thread] = []

    def start(self, job: str = "one", signals: int | None = None, terms: dict[str, Any] | None = None) -> None:
        def follow() -> None:
            part = node(self._port, self._folder, serves=False, job=job, terms=terms)
            with Machine(part) as machine, no_signals() as silence:
                heard = silence if signals is None else signals
                try:
                    self.outcomes.append(Follower(part, machine, heard, lambda: False).until_the_end())
                except DisttrainError as error:
                    self.outcomes.append(Outcome(error.exit_code, str(error)))

        self.threads.append(threading.Thread(target=follow, daemon=True))
        self.threads[-1].start()


class Workers:
    """What the workers leave in a folder, in the order in which they started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pids: list[int] = []

    def wait_for(self, number: int) -> dict[str, str]:
        """The environment of the worker that is started as this one, counted from 0."""
        until(lambda: self._have_come() > number)
        return json.loads((self._folder / f"{self.pids[number]}.started").read_text())

    def _have_come(self) -> int:
        for path in sorted(self._folder.glob("*.started"), key=lambda path: path.stat().st_mtime_ns):
            if int(path.stem) not in self.pids:
                self.pids.append(int(path.stem))
        return len(self.pids)

    def verdicts(self, number: int, count: int) -> list[dict[str, Any]]:
        """The first verdicts of this worker."""
        path = self._folder / f"{self.pids[number]}.verdicts"
        until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)
        return [json.loads(line) for line in path.read_bytes().splitlines()][:count]

    def kill(self, number: int) -> None:
        os.kill(self.pids[number], signal.SIGKILL)

    def has_gone(self, number: int) -> bool:
        try:
            return Path(f"/proc/{self.pids[number]}/stat").read_text().split()[2] == "Z"
        except OSError:
            return True


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def no_signals() -> Iterator[int]:
    """A descriptor that gives none."""
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(team_module, "_LAST_CALL_S", 0.0)
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


@contextmanager
def silent_team(folder: Path) -> Iterator[tuple[Team, int]]:
    """A team that has no machine yet, and the descriptor to which signals are written."""
    reader, writer = os.pipe()
    with reserved_port() as port:
        leading = node(port, folder, serves=True)
        with Machine(leading) as machine, closing(Team(leading, machine, reader, 16)) as team:
            yield team, writer
    os.close(reader)
    os.close(writer)


@contextmanager
def led(folder: Path) -> Iterator[tuple[Followers, Workers, list[Outcome], Team]]:
    """A machine that leads, on a thread, and what follows it; the outcome is there after the block."""
    outcomes: list[Outcome] = []
    with reserved_port() as port, no_signals() as silence:
        followers = Followers(port, folder)
        leading = node(port, folder, serves=True)
        machine = Machine(leading)
        team = Team(leading, machine, silence, leading.most_workers)

        def lead() -> None:
            with machine, closing(team):
                outcomes.append(together._led(leading, team, silence))
                team.end(outcomes[-1])

        thread = threading.Thread(target=lead, daemon=True)
        thread.start()
        try:
            yield followers, Workers(folder), outcomes, team
        finally:
            (folder / "go").touch()
            for one in (thread, *followers.threads):
                one.join(PATIENCE_S)
                assert not one.is_alive()


def test_workers_and_machines_are_lost_and_come_back_without_a_restart(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with led(folder) as (followers, workers, outcomes, team):
        followers.start()
        first = [workers.wait_for(number) for number in (0, 1)]
        assert {one["RANK"]: (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["LOCAL_RANK"]) for one in first} == {
            "0": ("2", "1", "0"),
            "1": ("2", "1", "0"),
        }
        assert {one["RANK"]: one["DISTTRAIN_NODE_SLOT"] for one in first} == {"0": "0 3", "1": "1 3"}
        here, there = sorted((0, 1), key=lambda number: first[number]["RANK"])

        workers.kill(there)  # of the other machine, which starts another one
        assert workers.wait_for(2)["DISTTRAIN_JOINS"] == "1"
        lost, joined = workers.verdicts(here, 2)
        assert (lost["rank"], lost["size"], lost["lost_ranks"]) == (0, 1, [1])
        assert "rank 1 on " in lost["lost"]
        assert (joined["rank"], joined["size"], joined["num_new"], joined["local_size"]) == (0, 2, 1, 1)
        assert [one["rank"] for one in workers.verdicts(2, 1)] == [1]

        until(lambda: all(worker.can_lead() for worker in team._at))  # what it says has come
        workers.kill(here)  # rank 0: the other machine's worker takes its place, where that machine says
        (as_first,) = workers.verdicts(2, 2)[1:]
        assert (as_first["rank"], as_first["size"], as_first["lost_ranks"]) == (0, 1, [0])
        assert as_first["host"] == "127.0.0.1"
        assert as_first["port"]
        assert workers.wait_for(3)["RANK"] == "0"
        assert workers.verdicts(3, 1)[0]["port"] == as_first["port"]

        team._machines[0].wire._connection.shutdown(socket.SHUT_RDWR)  # as the other machine is lost with rank 0
        (alone,) = workers.verdicts(3, 2)[1:]
        assert (alone["rank"], alone["size"], alone["lost_ranks"]) == (0, 1, [1])
        assert "its machine is lost" in alone["lost"]
        until(lambda: workers.has_gone(2))
        assert workers.wait_for(4)["DISTTRAIN_NODE_SLOT"] == "1 3", "it comes back by itself"
        assert workers.verdicts(3, 3)[2]["num_new"] == 1
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 0]
    assert "Restart" not in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["a worker", "a machine"])
def test_a_loss_ends_the_run_on_all_machines_where_the_recipe_says_so(folder: Path, lost: str) -> None:
    (folder / "stops").touch()
    with led(folder) as (followers, workers, outcomes, team):
        followers.start()
        first = [workers.wait_for(number) for number in (0, 1)]
        if lost == "a worker":
            workers.kill([one["RANK"] for one in first].index("1"))
        else:  # each takes the other for lost
            team._machines[0].wire._connection.shutdown(socket.SHUT_RDWR)
        until(lambda: bool(outcomes and followers.outcomes))
        assert all(workers.has_gone(number) for number in (0, 1))
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [71, 71]
    told = outcomes[0].message
    assert "rank 1 on " in told
    assert ("was killed by SIGKILL" if lost == "a worker" else "its machine is lost") in told
    if lost == "a worker":
        assert followers.outcomes[0].message == told, "each machine shows the cause"
    else:
        assert "lost the connection to 127.0.0.1" in followers.outcomes[0].message


@pytest.mark.parametrize("can_be_started", [True, False])
def test_a_machine_whose_worker_fails_to_join_is_not_asked_again(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, can_be_started: bool
) -> None:
    monkeypatch.setattr(watch_module, "LOOK_EVERY_S", 0.01)
    with led(folder) as (followers, workers, outcomes, team):
        followers.start()
        first = [workers.wait_for(number) for number in (0, 1)]
        (folder / "refuse").touch()
        if not can_be_started:
            monkeypatch.setattr(Machine, "start", _refuse_to_start)
        workers.kill([one["RANK"] for one in first].index("1"))
        until(lambda: not team._machines[0].is_fit and len(team._at) == 1)
        time.sleep(0.2)  # it would be asked at once
        assert len(team._at) == 1
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 0], "it waits for the end"
    told = capfd.readouterr().err
    assert told.count("continuing without a replacement") == 1
    assert ("rank 1: it could not be started: [Errno 11]" in told) is not can_be_started


def test_a_worker_of_another_machine_that_comes_as_the_others_finish_does_not_decide_how_the_run_ends(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with led(folder) as (followers, workers, outcomes, team):
        followers.start()
        first = [workers.wait_for(number) for number in (0, 1)]
        (folder / "slow").touch()
        here, there = sorted((0, 1), key=lambda number: first[number]["RANK"])
        workers.kill(there)
        workers.wait_for(2)
        workers.verdicts(here, 2)
        workers.verdicts(2, 1)  # it has a place
        (folder / "through").touch()
        until(lambda: workers.has_gone(2))
        until(lambda: not any(worker.waits_to_join() and not worker.has_ended() for worker in [*team._at]))
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 0]
    assert capfd.readouterr().err == ""


def _refuse_to_start(*_: object) -> None:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_lost_machine_is_one_loss(folder: Path) -> None:
    hello = {"host": "there", "address": "127.0.0.1", "workers": 8, "ports": [1, 2]}
    with silent_team(folder) as (team, _), socket.create_server(("127.0.0.1", 0)) as server:
        there = RemoteMachine(Wire(socket.create_connection(server.getsockname())), hello, team.pump)
        place = Place(1, 0, 8, 8, "127.0.0.1", 1, 1, 2)
        workers = [team._start(there, place) for _ in range(8)]
        assert team.num_losses(workers[:2]) == 2
        there.lose("its connection is closed")
        assert team.num_losses(workers) == 1
        assert team.replacement(workers[0]) is None
        team.forget(workers[0])
        team._at.clear()


def test_signals_that_come_while_a_worker_is_waited_for_are_kept_once(folder: Path) -> None:
    with silent_team(folder) as (team, signals):
        os.write(signals, bytes([signal.SIGTERM]))
        for _ in range(8):
            team._pump_for_later(0.0)
        assert team.pump(0.0) == bytes([signal.SIGTERM])
        assert team.pump(0.0) == b""


def test_a_machine_that_follows_notices_a_last_message_and_the_end_at_once(folder: Path) -> None:
    part = node(1, folder, serves=False)
    with (
        Machine(part) as machine,
        no_signals() as silence,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        wire = Wire(socket.create_connection(server.getsockname()))
        theirs, _ = server.accept()
        theirs.sendall(b"{}\n")
        theirs.close()
        time.sleep(0.05)  # until both are there
        with pytest.raises(Gone):
            Follower(part, machine, silence, lambda: False)._serve(wire)


def test_a_machine_that_hears_nothing_ends_its_workers_before_it_reads_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then its workers' places are given to others."""
    monkeypatch.setattr(follower_module, "LEASE_S", 3.0)
    workers = Workers(folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        followers = Followers(server.getsockname()[1], folder)
        followers.start()

        def accepted() -> tuple[Wire, dict[str, Any]]:
            connection, _ = server.accept()
            wire = Wire(connection)
            messages: list[dict[str, Any]] = []

            def is_greeted() -> bool:
                messages.extend(wire.received())
                return bool(messages)

            until(is_greeted)
            return wire, messages[0]

        wire, hello = accepted()
        assert (hello["job"], hello["workers"], hello["recipe"]) == ("one", 1, TERMS["recipe"])
        place = Place(1, 0, 2, 1, "127.0.0.1", 1, 1, 2)
        wire.send(leads="1.0", echo=hello["beat"])
        wire.send(start=1, place=place.fields())
        newest = hello["beat"]

        def has_started() -> bool:
            nonlocal newest
            for message in wire.received():
                if "beat" in message:
                    newest = message["beat"]
                    wire.send(echo=newest)
            return workers._have_come() > 0

        until(has_started)
        stale = threading.Event()

        def repeat() -> None:  # what was long on its way extends nothing
            while not stale.wait(0.1):
                wire.send(echo=newest)

        repeating = threading.Thread(target=repeat, daemon=True)
        repeating.start()
        again, hello = accepted()
        stale.set()
        repeating.join()
        assert workers.has_gone(0)
        assert "ports" in hello
        again.send(leads="1.0", echo=hello["beat"])
        again.send(to=1, do="kill")  # there is no such worker any more
        again.send(end=0, message="", traceback=None)
        followers.threads[0].join(PATIENCE_S)
        wire.close()
        again.close()
    assert followers.outcomes == [Outcome(0)]


def test_another_job_is_refused_and_what_is_no_machine_is_left_alone(folder: Path) -> None:
    with led(folder) as (followers, workers, outcomes, team):
        port = team._listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(PATIENCE_S)
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(1) == b""
        followers.start(job="another")
        until(lambda: bool(followers.outcomes))
        assert followers.outcomes[0].exit_code == 1
        assert "--job-id" in followers.outcomes[0].message
        followers.start()
        workers.wait_for(1)
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe": {"optim": {"lr": 0.2}, "data": {"root": "/there"}}}, "optim.lr is 0.2 in place of 0.1"),
        ({"sources": "def"}, "not the same code of it"),
        ({"version": "0.9"}, "it has disttrain 0.9, and the leading one 1.0"),
    ],
)
def test_a_machine_that_was_given_something_else_is_refused_before_it_gets_a_place(
    folder: Path, change: dict[str, Any], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a machine may have for itself, such as where its data lie, is no reason."""
    with led(folder) as (followers, workers, outcomes, _):
        followers.start(terms=TERMS | change)
        until(lambda: bool(followers.outcomes))
        assert followers.outcomes[0].exit_code == 78
        assert says in followers.outcomes[0].message
        followers.start(terms=TERMS | {"recipe": TERMS["recipe"] | {"data": {"root": "/there"}}})
        workers.wait_for(1)
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 78, 0]
    assert capfd.readouterr().err.count(f"{socket.gethostname()} cannot take part: ") == 1


def test_a_machine_whose_workers_would_restart_is_refused_where_one_leads(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first bytes that its agent sends; and the agent asks why."""
    with led(folder) as (followers, workers, _, team):
        port = team._listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as agent:
            agent.sendall(TO_A_STORE + b"\x0dabcd")
            assert agent.recv(1) == b""
        monkeypatch.setattr(agents_look, "__version__", "1.0")
        refusal = refusal_at("127.0.0.1", port, "one")
        followers.start()
        workers.wait_for(1)
    for said in (refusal, capfd.readouterr().err):
        assert said is not None
        assert "have all workers restart after a loss" in said
        assert "Give all machines the same recipe" in said
    assert refusal_at("127.0.0.1", 1, "one") is None


def test_a_machine_that_comes_to_where_torchruns_agents_meet_is_refused(folder: Path) -> None:
    command = [sys.executable, "-c", STORE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as store:
        assert store.stdout is not None
        port = int(store.stdout.readline())
        followers = Followers(port, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(follower_module, "LEASE_S", 0.5)
            followers.start()
            until(lambda: bool(followers.outcomes))
        store.communicate()
    assert followers.outcomes[0].exit_code == 78
    assert "has all workers restart after a loss" in followers.outcomes[0].message


def test_messages_come_whole_and_a_closed_wire_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:
        wire = Wire(server.accept()[0])
        theirs.sendall(b'{"a": 1}\n{}\n{"b"')
        until(lambda: wire.received() == [{"a": 1}])
        theirs.sendall(b": 2}\n")
        theirs.close()
        until(lambda: wire.received() == [{"b": 2}])
        with pytest.raises(Gone):
            wire.received()


def test_a_machine_without_a_place_is_told_and_ends_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with led(folder) as (followers, workers, outcomes, team):
        followers.start()
        first = [workers.wait_for(number) for number in (0, 1)]
        reader, writer = os.pipe()
        followers.start(signals=reader)  # two workers are as many as can share a step
        said = ""

        def is_told() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "no place for this machine" in said

        until(is_told)
        os.write(writer, bytes([signal.SIGTERM]))
        until(lambda: bool(followers.outcomes) and len(team._machines) == 1)
        workers.kill([one["RANK"] for one in first].index("1"))
        workers.wait_for(2)  # a run that was asked to stop would start none
    os.close(reader)
    os.close(writer)
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 75, 0]
    assert said.count("no place for this machine") == 1


def test_a_worker_with_edited_code_is_refused_before_it_joins_wherever_it_is(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file of the run is compared: the machine may not see it."""
    (folder / "model").write_text("as it was")
    with led(folder) as (followers, workers, _, team):
        followers.start()
        first = [workers.wait_for(number) for number in (0, 1)]
        (folder / "model").write_text("edited")
        here, there = sorted((0, 1), key=lambda number: first[number]["RANK"])
        workers.kill(there)
        until(lambda: not team._machines[0].is_fit and len(team._at) == 1)
        until(lambda: workers._have_come() > 2 and workers.has_gone(2))
        assert [verdict["num_new"] for verdict in workers.verdicts(here, 1)] == [0]
    words = "continuing without a replacement for rank 1: model is not what it was when the run began"
    assert capfd.readouterr().err.count(words) == 1


def test_a_machine_that_comes_late_ends_where_a_loss_is_to_end_the_run(folder: Path) -> None:
    (folder / "stops").touch()
    with led(folder) as (followers, workers, outcomes, team):
        followers.start()
        workers.wait_for(1)
        followers.start()
        until(lambda: bool(followers.outcomes))
        assert followers.outcomes[0].exit_code == 0
        assert "the run began without this machine" in followers.outcomes[0].message
        until(lambda: len(team._machines) == 1)
    assert [outcome.exit_code for outcome in (*outcomes, *followers.outcomes)] == [0, 0, 0]


def test_the_time_of_a_loss_elsewhere_is_by_the_clock_here(folder: Path) -> None:
    hello = {"host": "there", "address": "127.0.0.1", "workers": 1, "ports": [1, 2]}
    with silent_team(folder) as (team, _), socket.create_server(("127.0.0.1", 0)) as server:
        there = RemoteMachine(Wire(socket.create_connection(server.getsockname())), hello, team.pump)
        worker = there.start(Place(1, 0, 2, 1, "127.0.0.1", 1, 1, 2))
        ending = LocalEnding(1, -9, 5.0, None, asked=False, log=None, last_words="", host="there")
        began = time.time()
        there.take({"of": 1, "ended": told_of(ending)})
        assert worker.ending is not None
        assert worker.ending.time >= began
        there.wire.close()
