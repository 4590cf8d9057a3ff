"""`disttrain node`: one job on several machines, each a network namespace with its own address."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.testing import cluster, faults, hosts, run_workers
from disttrain.testing.hosts import Cluster, Host
from disttrain_launch.cli.node import node
from disttrain_launch.nodes.node import parse_nodes, parse_rendezvous
from tests.disttrain.parallel.exact_runs import SMALL, outcome, train

ROOT = Path(__file__).parents[3]
MODEL = "model.name=tests.disttrain.parallel.exact_runs:build"
RESTART = "parallel.on_lost_worker=restart"
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


class Nodes:
    """`disttrain node` on each of some machines, with what they print."""

    def __init__(self, machines: Cluster, folder: Path) -> None:
        self.machines, self.folder, self.run_dir = machines, folder, folder / "run"
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *options: str, overrides: tuple[str, ...] = (), variables: dict[str, str] | None = None) -> None:
        for machine in self.machines:
            self.start_on(machine, *options, overrides=overrides, variables=variables)

    def start_on(
        self, machine: Host, *options: str, overrides: tuple[str, ...] = (), variables: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        words = [word for override in (*SMALL, MODEL, *overrides) for word in ("-o", override)]
        command = [sys.executable, "-m", "disttrain_launch", "node", "digits", *words, "--run-dir", str(self.run_dir)]
        command += ["--rendezvous", f"{self.machines[0].address}:29400", *options]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_", "MASTER_"))}
        log = (self.folder / f"{machine.name}-{len(self.processes)}.log").open("w")
        environment = {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}", **(variables or {})}
        process = machine.start(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)
        self.processes.append(process)
        return process

    def said(self, number: int) -> str:
        return next(self.folder.glob(f"*-{number}.log")).read_text()

    def end(self, timeout_s: float = 400) -> list[int]:
        return [process.wait(timeout=timeout_s) for process in self.processes]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Nodes]:
    with cluster(2) as machines:
        yield Nodes(machines, tmp_path)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 400.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def newest(run_dir: Path) -> tuple[int, str, str]:
    """The step of the newest checkpoint, and the SHA-256 of its weights and of its optimizer's state."""
    found = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])
    return found.state["step"], weights_sha256(found.model), weights_sha256(found.optimizer)


def has_steps(run_dir: Path, number: int) -> bool:
    journal = run_dir / "journal.jsonl"
    return journal.exists() and journal.read_text().count('"train/loss"') >= number


@needs_hosts
def test_a_killed_worker_is_started_again_and_a_request_to_stop_at_one_machine_stops_all(
    two: Nodes, tmp_path: Path
) -> None:
    """All save, and no bit tells of either: at a constant rate, a run is the beginning of each longer one."""
    long = (RESTART, "train.epochs=100000", "schedule.name=constant", "checkpoint.every_steps=2")
    with faults.armed(faults.kill(1, step=6)) as armed:
        two.start("--nodes=2", "--max-restarts=2", overrides=long, variables=armed)
        wait_for(lambda: has_steps(two.run_dir, 12), "some steps after the restart")
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.end() == [75, 75], [two.said(0), two.said(1)]
    restarted = r"(Restart 1 of 2|The workers of all nodes restart) from the latest checkpoint"
    for number in (0, 1):
        line = next(line for line in two.said(number).splitlines() if line.startswith("disttrain:"))
        assert re.fullmatch(rf"disttrain: rank 1 on host-1 was killed by SIGKILL .*\. {restarted}", line), line
        assert two.said(number).count("SIGKILL") == 1
    assert "stopped on request" in two.said(0)
    assert "SIGTERM: asking the workers to save and stop" in two.said(1)
    step, *weights = newest(two.run_dir)
    assert f"after step {step} of" in two.said(0)
    alone, last = tmp_path / "alone", f"train.max_steps={step}"
    run_workers(lambda: train(alone, MODEL, *long, last), 1, process_group=False, timeout_s=480)
    assert newest(alone) == (step, *weights)


@needs_hosts
@pytest.mark.long
def test_machines_that_are_stopped_at_once_finish_a_long_save(two: Nodes) -> None:
    with faults.armed(faults.slow(0, 8.0, at="checkpoint: begun")) as slowed:
        two.start("--nodes=2", overrides=(RESTART, "train.epochs=100000"), variables=slowed)
        wait_for(lambda: has_steps(two.run_dir, 3), "some steps")
        for process in two.processes:
            process.send_signal(signal.SIGTERM)
        assert two.end() == [75, 75], [two.said(0), two.said(1)]
    for number in (0, 1):
        assert "the checkpoint is saved" in two.said(number)


@needs_hosts
@pytest.mark.long
@pytest.mark.parametrize("code", [70, 78])
def test_what_a_retry_cannot_mend_ends_all_machines_with_the_same_code(two: Nodes, code: int) -> None:
    """The other machine's worker only sees a connection that is lost."""
    with faults.armed(faults.leave(1, code, step=3)) as armed:
        two.start("--nodes=2", "--max-restarts=3", overrides=(RESTART,), variables=armed)
        assert two.end() == [code, code], [two.said(0), two.said(1)]
    for number in (0, 1):
        assert f"rank 1 on host-1 exited with code {code} without giving a reason" in two.said(number)
        assert "Restart" not in two.said(number)


@needs_hosts
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_machine_dies_and_a_new_one_takes_its_place(two: Nodes, tmp_path: Path) -> None:
    longer = (RESTART, "train.epochs=30", "checkpoint.every_steps=3", "train.hang_timeout_s=5")
    reference = tmp_path / "reference"
    run_workers(lambda: train(reference, MODEL, *longer), 1, process_group=False, timeout_s=200)
    with faults.armed(faults.slow(0, 0.1)) as slowed:
        two.start("--nodes=2", "--max-restarts=5", overrides=longer, variables=slowed)
        wait_for(lambda: has_steps(two.run_dir, 10), "some steps")
        two.machines[1].kill()
        replaced = two.machines.replace(two.machines[1])
        two.start_on(replaced, "--nodes=2", "--max-restarts=5", overrides=longer, variables=slowed)
        first, _, second = two.end(300)
    assert (first, second) == (0, 0), [two.said(0), two.said(2)]
    assert outcome(two.run_dir) == outcome(reference)


@needs_hosts
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_machine_that_is_cut_off_for_ten_seconds_goes_on(two: Nodes, tmp_path: Path) -> None:
    longer = (RESTART, "train.epochs=60", "checkpoint.every_steps=3", "train.hang_timeout_s=60")
    reference = tmp_path / "reference"
    run_workers(lambda: train(reference, MODEL, *longer), 1, process_group=False, timeout_s=200)
    with faults.armed(faults.slow(0, 0.05)) as slowed:
        two.start("--nodes=2", "--max-restarts=5", overrides=longer, variables=slowed)
        wait_for(lambda: has_steps(two.run_dir, 10), "some steps")
        two.machines[1].cut()
        time.sleep(10)
        two.machines[1].join()
        assert two.end(300) == [0, 0], [two.said(0), two.said(1)]
    assert outcome(two.run_dir) == outcome(reference)


def refused(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "disttrain_launch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--nodes=2", "--run-dir=r"], 2, "--nodes and --rendezvous belong together"),
        (["--rendezvous=a:1", "--run-dir=r"], 2, "--nodes and --rendezvous belong together"),
        (["--nodes=3:2", "--rendezvous=localhost:1", "--run-dir=r"], 2, "MIN must not be more than MAX"),
        (["--nodes=two", "--rendezvous=localhost:1", "--run-dir=r"], 2, "'two' is not a valid number of nodes"),
        (["--nodes=2", "--rendezvous=localhost:x", "--run-dir=r"], 2, "'localhost:x' is not of the form HOST:PORT"),
        (["--nodes=2", "--rendezvous=localhost:70000", "--run-dir=r"], 2, "a port is a number from 1 to 65535"),
        (["--nodes=2", "--rendezvous=localhost:1"], 2, "--run-dir is missing"),
        (["--nodes=2", "--rendezvous=a..b:1", "--run-dir=r"], 2, "'a..b' is not a valid name of a machine"),
        (
            ["--nodes=5", "--rendezvous=localhost:1", "--run-dir=r", "-o", "parallel.exact=true"],
            78,
            "at most parallel.slices = 4 workers",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("node", "train") if "--nodes=2" in arguments[:1] else ("node",):
        returncode, last_line = refused(command, "digits", *arguments)
        assert (returncode, says in last_line) == (code, True), last_line
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["digits", "-o", "optim.lr=0.5", "--dry-run"]
    several = ["--nodes=1:4", "--rendezvous=127.0.0.1:29400", "--run-dir=a folder", "-n", "3", "--max-restarts=7"]
    command = [sys.executable, "-m", "disttrain_launch", "train", *common]
    one = subprocess.run([*command, "-n", "2"], capture_output=True, text=True, check=True, timeout=240).stdout
    more = subprocess.run([*command, *several], capture_output=True, text=True, check=True, timeout=240).stdout
    assert [line.count("RANK=") for line in one.splitlines()] == [2, 2]
    assert f"-P -m disttrain digits --run-dir {tmp_path}/runs/digits-" in one
    assert "GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME==lo" in more, "NCCL takes a bare name for that of lo0, too"
    assert "--nodes 1 4 --rendezvous 127.0.0.1:29400 --serves true" in more
    assert "--recipe digits --override=optim.lr=0.5 -- " in more
    assert more.rstrip().endswith(f"-- -P -m disttrain digits --run-dir '{tmp_path}/a folder' -o optim.lr=0.5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "continues"),
    [
        (("parallel.on_lost_worker=continue",), False),
        (("parallel.exact=true",), True),
        (("parallel.exact=true", "parallel.on_lost_worker=restart"), False),
        (("parallel.exact=true", "parallel.strategy=fsdp"), False),
    ],
)
def test_what_cannot_continue_gets_the_launcher_that_restarts(
    overrides: tuple[str, ...], continues: bool, tmp_path: Path
) -> None:
    words = [f"--override={one}" for one in overrides]
    options = ["--nodes=2", "--rendezvous=127.0.0.1:29400", f"--run-dir={tmp_path / 'run'}", "--dry-run"]
    printed = CliRunner().invoke(node, ["digits", *words, *options])
    assert printed.exit_code == 0, printed.output
    assert ("--rendezvous" not in printed.output) == continues  # else an option of the agent that restarts


def test_numbers_of_nodes_and_places_to_meet_are_read() -> None:
    assert parse_nodes("3") == (3, 3)
    assert parse_nodes("1:4") == (1, 4)
    assert parse_rendezvous("box") == ("box", 29400)
    assert parse_rendezvous("10.0.0.1:80") == ("10.0.0.1", 80)
    assert parse_rendezvous("[fd00::1]:80") == ("fd00::1", 80)
