"""How long a killed node of two holds a run up, against a cold start of both. Needs root on Linux.

    python benchmarks/nodes.py [--rounds 3]

Each round starts `disttrain node` on two simulated machines, timed from the commands to the first step in the journal.
Then everything on the second machine gets SIGKILL, and a new `disttrain node` is started there at once, as a cluster
would; timed from the kill to the first step that was not in the journal.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from endless import OVERRIDES, newest_step
from here import here

from disttrain.testing import cluster
from disttrain.testing.hosts import Cluster, Host


def start(machine: Host, machines: Cluster, run_dir: Path) -> subprocess.Popen[bytes]:
    """`disttrain node` on a machine."""
    command = [sys.executable, "-m", "disttrain_launch", "node", "digits", *OVERRIDES, "--run-dir", str(run_dir)]
    command += ["--nodes", "2", "--rendezvous", f"{machines[0].address}:29400", "--max-restarts", "3"]
    return machine.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Until the journal has more than `step` of them."""
    deadline = time.monotonic() + 300
    while newest_step(run_dir) <= step:
        assert time.monotonic() < deadline, "nothing has happened for five minutes"
        time.sleep(0.01)


def round_trip(run_dir: Path) -> tuple[float, float]:
    """(cold start of both, from the kill to the next new step), in seconds."""
    with cluster(2) as machines:
        began = time.perf_counter()
        for machine in machines:
            start(machine, machines, run_dir)
        wait_for_step(run_dir, 0)
        cold = time.perf_counter() - began
        wait_for_step(run_dir, 20)
        killed = time.perf_counter()
        for pid in machines[1].pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        start(machines[1], machines, run_dir)
        time.sleep(0.5)  # what was on its way to the journal has arrived
        wait_for_step(run_dir, newest_step(run_dir))
        return cold, time.perf_counter() - killed


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(here())
    with tempfile.TemporaryDirectory() as folder:
        found = [round_trip(Path(folder, str(number))) for number in range(options.rounds)]
    for name, values in zip(("cold start", "after SIGKILL"), zip(*found, strict=True), strict=True):
        print(f"{name:<15}{statistics.median(values):.2f} s  ({min(values):.2f} to {max(values):.2f})")
    ratios = [again / cold for cold, again in found]
    print(f"{'ratio':<15}{statistics.median(ratios):.2f}    ({min(ratios):.2f} to {max(ratios):.2f}), at most 1.30")


if __name__ == "__main__":
    main()
