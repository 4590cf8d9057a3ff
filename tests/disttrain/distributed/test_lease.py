"""A worker ends when its lease does, whatever has become of its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from disttrain.distributed.lease import HeldLease, Lease, now
from disttrain.layout import LAUNCHED_BY, LEASE

WORKER = """
import subprocess, sys, time
from disttrain.health.stop import end_with_launcher
end_with_launcher()
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_worker_and_its_children_end_when_nobody_extends_its_lease() -> None:
    lease = Lease()
    lease.extend(now() + 600)
    environment = os.environ | {LEASE: str(lease.fileno()), LAUNCHED_BY: "disttrain node"}
    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        pass_fds=[lease.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as worker:
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        time.sleep(1.5)  # longer than it sleeps between two looks
        assert worker.poll() is None
        lease._memory[:8] = bytes(8)  # as if it had been given for so long
        assert worker.wait(60) == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while is_running(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    lease.close()


def test_a_lease_is_never_shortened() -> None:
    lease = Lease()
    assert lease.is_over
    lease.extend(now() + 600)
    lease.extend(now() + 5)  # an answer to an earlier sign of life
    assert not lease.is_over
    held = HeldLease.of_this_process({LEASE: str(lease.fileno())})
    assert held is not None
    assert held.left_s > 500
    assert HeldLease.of_this_process({LEASE: ""}) is None
    lease.close()


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except OSError:
        return False
