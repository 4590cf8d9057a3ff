"""Simulated machines: torchrun across them, a cut link that is noticed, a machine that comes back or is replaced."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disttrain.testing import Cluster, HarnessError, Host, cluster, hosts, run_workers, workers

pytestmark = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))

# Answers each connection with the name of the machine.
SERVER = """
import socket
server = socket.create_server(("", 9000))
while True:
    connection, _ = server.accept()
    connection.sendall(socket.gethostname().encode())
    connection.close()
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], 9000), timeout=1) as connection:
    print(connection.recv(100).decode())
"""


def serve(host: Host) -> None:
    host.start([sys.executable, "-c", SERVER])


def ask(here: Host, there: str) -> str:
    """The name that the server at the address or name `there` gives; its error's name if there is no answer."""
    deadline = time.monotonic() + 480
    while True:
        done = here.run([sys.executable, "-c", CLIENT, there])
        if done.returncode == 0:
            return done.stdout.strip()
        error = done.stderr.strip().splitlines()[-1].split(":")[0]
        if error != "ConnectionRefusedError" or time.monotonic() > deadline:  # refused: it is not up yet
            return error
        time.sleep(0.05)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_machines_know_and_reach_each_other() -> None:
    with cluster(2) as machines:
        serve(machines[0])
        assert ask(machines[1], machines[0].address) == "host-0"
        assert ask(machines[1], "host-0") == "host-0"
        assert machines[1].run(["hostname"]).stdout == "host-1\n"
        names = [machine.namespace for machine in machines]
        assert all(name in namespaces() for name in names)
    assert not any(name in namespaces() for name in names)
    assert socket.gethostname() not in ("host-0", "host-1")


def test_a_cut_link_is_noticed_and_a_rejoined_machine_works_again() -> None:
    with cluster(2) as machines:
        serve(machines[0])
        assert ask(machines[1], "host-0") == "host-0"
        machines[0].cut()
        assert ask(machines[1], "host-0") in ("TimeoutError", "OSError")
        machines[0].join()
        assert ask(machines[1], "host-0") == "host-0"


def test_a_killed_machine_is_replaced_under_its_own_and_under_a_new_address() -> None:
    with cluster(2) as machines:
        serve(machines[0])
        assert ask(machines[1], "host-0") == "host-0"
        machines[0].kill()
        assert machines[0].pids() == []
        fresh = machines.replace(machines[0])
        assert (fresh.name, fresh.address) == ("host-0", "10.111.0.1")
        serve(fresh)
        assert ask(machines[1], fresh.address) == "host-0"
        other = machines.replace(fresh, same_address=False)
        assert other.name == "host-2"
        serve(other)
        assert ask(machines[1], "host-2") == "host-2"


def test_a_limited_link_is_slow() -> None:
    script = """
import socket, sys, time
if sys.argv[1] == "send":
    with socket.create_connection((sys.argv[2], 9001)) as connection:
        connection.sendall(bytes(500_000))
else:
    server = socket.create_server(("", 9001))
    print("up", flush=True)
    connection, _ = server.accept()
    start, size = time.monotonic(), 0
    while data := connection.recv(65536):
        size += len(data)
    print(size, time.monotonic() - start)
"""

    def seconds(machines: Cluster) -> float:
        receiver = machines[0].start([sys.executable, "-c", script, "receive"], stdout=subprocess.PIPE, text=True)
        with receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "up\n"
            assert machines[1].run([sys.executable, "-c", script, "send", "host-0"]).returncode == 0
            size, taken = receiver.stdout.readline().split()
        assert size == "500000"
        return float(taken)

    with cluster(2) as machines:
        machines[1].limit("1mbit")
        limited = seconds(machines)
        assert limited > 2.4  # 500 kB less the first bursts, at 125 kB/s
        machines[1].limit(None)
        assert seconds(machines) < limited


TRAINING = """
import socket, torch, torch.distributed as dist
dist.init_process_group("gloo")
tensor = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(tensor)
print(socket.gethostname(), int(tensor), dist.get_world_size(), flush=True)
dist.destroy_process_group()
"""


def test_torchrun_across_two_machines_sums_a_tensor(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    with cluster(2) as machines:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={machines[0].address}:29400", "--rdzv-id=sum", str(script)]
        agents = [
            machine.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for machine in machines
        ]
        outputs = [agent.communicate(timeout=480) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    printed = [line for out, _ in outputs for line in out.splitlines()]
    assert sorted(printed) == ["host-0 3 2", "host-1 3 2"]


def test_warm_workers_live_on_the_machines() -> None:
    def body() -> tuple[str, int, float]:
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        return socket.gethostname(), dist.get_rank(), tensor.item()

    assert run_workers(body, 4, hosts=2) == [("host-0", 0, 4), ("host-0", 1, 4), ("host-1", 2, 4), ("host-1", 3, 4)]
    with pytest.raises(ValueError, match="cannot be spread evenly over 2 hosts"):
        run_workers(body, 3, hosts=2)


def test_a_partition_between_workers_is_a_hang() -> None:
    def body() -> None:
        dist.barrier()

    with cluster(2) as machines, workers(2, hosts=machines, timeout_s=2) as group:
        group.run(body)
        machines[1].cut()
        assert [outcome.state for outcome in group.attempt(body)] == ["hung", "hung"]


@pytest.mark.distributed(world_size=2, hosts=2)
def test_the_marker_gives_machines(rank: int, cluster: Cluster) -> None:
    assert socket.gethostname() == f"host-{rank}"
    assert cluster[rank].address == f"10.111.0.{rank + 1}"
    dist.barrier()


def test_without_root_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(HarnessError, match="need root"), cluster(1):
        pass
