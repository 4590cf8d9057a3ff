"""Two machines that continue without what they lose: each a network namespace with its own address."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from disttrain.runs.journal import read_journal
from disttrain.testing import cluster, faults, hosts, run_workers
from disttrain.testing.hosts import Host
from tests.disttrain.parallel.exact_runs import outcome, train
from tests.launch.nodes.test_node import MODEL, Nodes, has_steps, wait_for

PATIENT = ("train.hang_timeout_s=60",)
LONG = (*PATIENT, "train.epochs=150")
pytestmark = [
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
    pytest.mark.long,
    pytest.mark.timeout(900),
]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Nodes]:
    with cluster(2) as machines:
        yield Nodes(machines, tmp_path)


def workers_of(machine: Host) -> list[int]:
    """The processes of its workers."""
    found = []
    for pid in machine.pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if "disttrain" in words and "node" not in words:
            found.append(pid)
    return found


def events(two: Nodes, name: str) -> list[dict[str, Any]]:
    path = two.run_dir / "journal.jsonl"
    return [record for record in read_journal(path) if record.get("name") == name]


def wait_for_events(two: Nodes, lost: int, joined: int) -> None:
    def have_come() -> bool:
        return (len(events(two, "worker-lost")), len(events(two, "worker-joined"))) == (lost, joined)

    wait_for(have_come, f"{lost} losses and {joined} newcomers: {[two.said(0), two.said(1)]}")


@contextmanager
def continued_without_rank_0(two: Nodes, reference: Path) -> Iterator[dict[str, str]]:
    """A slow run whose directory host-1 has since host-0 lost rank 0, and the variables that make a worker slow.

    The same run, undisturbed, is at `reference`.
    """
    run_workers(lambda: train(reference, MODEL, *LONG), 1, process_group=False, timeout_s=480)
    with faults.armed(faults.slow(0, 0.1), faults.slow(1, 0.1)) as slowed:
        two.start("--nodes=2", "--max-restarts=2", overrides=LONG, variables=slowed)
        wait_for(lambda: has_steps(two.run_dir, 3), "some steps")
        (rank_0,) = workers_of(two.machines[0])
        os.kill(rank_0, signal.SIGKILL)
        wait_for_events(two, lost=1, joined=1)
        assert "host-1" in (two.run_dir / ".lock").read_text()
        yield slowed


def test_two_machines_lose_rank_0_then_the_link_then_one_of_them_and_go_on(two: Nodes, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    with continued_without_rank_0(two, reference) as slowed:
        (rank_0,) = workers_of(two.machines[1])
        two.machines[1].cut()
        wait_for_events(two, lost=2, joined=1)
        assert "host-0" in (two.run_dir / ".lock").read_text()
        assert rank_0 not in workers_of(two.machines[1]), "who is cut off ends before another takes its place"
        two.machines[1].join()
        wait_for_events(two, lost=2, joined=2)

        two.machines[1].kill()
        replaced = two.machines.replace(two.machines[1])
        wait_for_events(two, lost=3, joined=2)
        two.start_on(replaced, "--nodes=2", "--max-restarts=2", overrides=LONG, variables=slowed)
        wait_for_events(two, lost=3, joined=3)
        first, _, second = two.end(480)
    said = [two.said(number) for number in (0, 1, 2)]
    assert (first, second) == (0, 0), said
    assert outcome(two.run_dir) == outcome(reference)
    assert not any("Restart" in one or "restart" in one for one in said), said
    what = [event["what"] for event in events(two, "worker-lost")]
    assert "killed by SIGKILL" in what[0]
    assert "host-1: its machine is lost: no sign of life" in what[1]
    steps = [record["step"] for record in read_journal(two.run_dir / "journal.jsonl") if "train/loss" in str(record)]
    assert len(steps) == len(set(steps)), "no row twice"


def test_a_machine_that_stood_still_wakes_up_without_a_place_and_writes_nothing(two: Nodes, tmp_path: Path) -> None:
    """All of its processes, rank 0 among them, as a machine that a hypervisor pauses: then it goes on where it was.

    Here both have one kernel, which keeps the lock of a process that is stopped. So this takes the lock's place away,
    as an NFS server does when the lease of a client has run out.
    """
    reference = tmp_path / "reference"
    with continued_without_rank_0(two, reference):
        (rank_0,) = workers_of(two.machines[1])
        stopped = two.machines[1].pids()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        (two.run_dir / ".lock").unlink()
        wait_for_events(two, lost=2, joined=1)
        journal = (two.run_dir / "journal.jsonl").read_text()
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        wait_for(lambda: rank_0 not in workers_of(two.machines[1]), "the end of what had a place")
        wait_for_events(two, lost=2, joined=2)
        assert two.end(480) == [0, 0], [two.said(0), two.said(1)]
    assert (two.run_dir / "journal.jsonl").read_text().startswith(journal)
    records = list(read_journal(two.run_dir / "journal.jsonl"))
    assert not [record for record in records if record.get("name") == "failed"], "nothing of who woke up"
    assert outcome(two.run_dir) == outcome(reference)
    steps = [record["step"] for record in records if "train/loss" in str(record)]
    assert len(steps) == len(set(steps)), "no row twice"


def test_a_lost_worker_ends_the_run_on_both_machines_where_the_recipe_says_stop(two: Nodes) -> None:
    longer = ("parallel.on_lost_worker=stop", "train.epochs=100000", "checkpoint.every_steps=2")
    two.start("--nodes=2", "--max-restarts=2", overrides=longer)
    wait_for(lambda: has_steps(two.run_dir, 6), "some steps")
    (rank_1,) = workers_of(two.machines[1])
    os.kill(rank_1, signal.SIGKILL)
    assert two.end(240) == [71, 71], [two.said(0), two.said(1)]
    for number in (0, 1):
        assert "rank 1 on host-1 was killed by SIGKILL" in two.said(number)
        assert 'parallel.on_lost_worker is "stop": not restarting' in two.said(number)
        assert "Restart " not in two.said(number)


def test_the_leading_machine_is_lost_and_all_resume_once_it_is_started_again(two: Nodes, tmp_path: Path) -> None:
    """Without a word from anybody at the other machine, which ends its workers and waits meanwhile."""
    longer = (*PATIENT, "train.epochs=60", "checkpoint.every_steps=5")
    reference = tmp_path / "reference"
    run_workers(lambda: train(reference, MODEL, *longer), 1, process_group=False, timeout_s=480)
    with faults.armed(faults.slow(0, 0.1), faults.slow(1, 0.1)) as slowed:
        two.start("--nodes=2", overrides=longer, variables=slowed)
        wait_for(lambda: has_steps(two.run_dir, 12), "some steps and a checkpoint")
        two.machines[0].kill()
        again = two.machines.replace(two.machines[0])
        words = "the workers here are ended, and join again when it is back"
        wait_for(lambda: words in two.said(1), "what the other machine says")
        wait_for(lambda: not workers_of(two.machines[1]), "the end of its workers")
        two.start_on(again, "--nodes=2", overrides=longer, variables=slowed)
        _, second, first = two.end(480)
    said = [two.said(number) for number in (0, 1, 2)]
    assert (first, second) == (0, 0), said
    assert outcome(two.run_dir) == outcome(reference)
    assert "resuming from step 1" in said[2], "the latest checkpoint: step 10, or one of the next"
    assert len(events(two, "resume")) == 1
    assert not events(two, "worker-lost")
