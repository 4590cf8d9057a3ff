"""However workers are started and wherever they are, exact mode gives the same bits; and while hosts come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from disttrain.testing import cluster, faults, hosts, run_workers
from tests.disttrain.parallel.exact_runs import SMALL, outcome, train

ROOT = Path(__file__).parents[3]
MODEL = "model.name=tests.disttrain.parallel.exact_runs:build"
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


def job(run_dir: Path, *overrides: str) -> list[str]:
    """A worker's arguments for the small job."""
    words = [word for override in (*SMALL, MODEL, *overrides) for word in ("-o", override)]
    return ["digits", *words, "--run-dir", str(run_dir)]


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "disttrain"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_", "MASTER_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def undisturbed(run_dir: Path, *overrides: str) -> None:
    run_workers(lambda: train(run_dir, MODEL, *overrides), 1, process_group=False, timeout_s=480)


def test_torchrun_gives_the_bits_of_warm_workers(tmp_path: Path) -> None:
    """As does `disttrain train`: see test_kills.py."""
    undisturbed(tmp_path / "reference")
    command = [*torchrun("--standalone", "--nproc-per-node=2"), *job(tmp_path / "torchrun")]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=480)
    assert ended.returncode == 0, ended.stderr
    assert outcome(tmp_path / "torchrun") == outcome(tmp_path / "reference")


@needs_hosts
@pytest.mark.long
def test_two_machines_give_the_bits_of_one(tmp_path: Path) -> None:
    undisturbed(tmp_path / "reference")
    with cluster(2) as machines:
        agents = [
            machine.start(
                [
                    *torchrun(
                        "--nnodes=2",
                        f"--node-rank={rank}",
                        f"--master-addr={machines[0].address}",
                        f"--nproc-per-node={1 + rank}",
                    ),
                    *job(tmp_path / "hosts"),
                ],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, machine in enumerate(machines)
        ]
        for agent in agents:
            _, errors = agent.communicate(timeout=480)
            assert agent.returncode == 0, errors
    assert outcome(tmp_path / "hosts") == outcome(tmp_path / "reference")


def starts(run_dir: Path) -> list[int]:
    """With how many workers the run was started and resumed, as its journal tells."""
    try:
        lines = (run_dir / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in lines]
    return [record["world"]["world_size"] for record in records if record.get("name") in ("start", "resume")]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)


def steps(run_dir: Path) -> int:
    """How many steps the journal has."""
    return (run_dir / "journal.jsonl").read_text().count('"train/loss"')


@needs_hosts
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_host_leaves_and_another_joins(tmp_path: Path) -> None:
    """torchrun's elastic mode: two hosts, then one, since the other loses its power, then two again; the same bits."""
    overrides = ("train.epochs=80", "train.hang_timeout_s=5", "checkpoint.every_steps=3")
    undisturbed(tmp_path / "reference", *overrides)
    run_dir = tmp_path / "elastic"
    with cluster(2) as machines, faults.armed(faults.slow(0, 0.1)) as slowed:
        # Without this, torchrun does not tell the address of its store to a host that joins later.
        slowed["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = torchrun(
            "--nnodes=1:4",
            "--nproc-per-node=1",
            "--max-restarts=10",
            "--rdzv-backend=c10d",
            "--rdzv-id=job",
            f"--rdzv-endpoint={machines[0].address}:29400",
            "--rdzv-conf=last_call_timeout=2,join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=3",
        )

        def start(number: int) -> subprocess.Popen[str]:
            log = (tmp_path / f"agent-{number}.log").open("w")
            arguments = [*command, *job(run_dir, *overrides)]
            return machines[number].start(arguments, cwd=ROOT, env=environment(**slowed), stdout=log, stderr=log)

        first, _ = start(0), start(1)
        wait_for(lambda: starts(run_dir)[-1:] == [2] and steps(run_dir) > 10, "two workers")
        machines[1].kill()
        wait_for(lambda: starts(run_dir)[-1:] == [1], "one worker")
        wait_for(lambda: steps(run_dir) > 40, "some more steps")
        machines.replace(machines[1])
        second = start(1)
        wait_for(lambda: starts(run_dir)[-1:] == [2], "two workers again")
        assert first.wait(timeout=480) == 0, (tmp_path / "agent-0.log").read_text()[-2000:]
        assert second.wait(timeout=240) == 0
    assert outcome(run_dir) == outcome(tmp_path / "reference")
