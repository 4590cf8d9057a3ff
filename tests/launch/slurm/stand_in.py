"""Stand-ins for sbatch, srun and scontrol: one job at a time, its tasks as real processes on simulated machines.

Called by the name it is linked to. CLUSTER holds: `machines.json` (the fields of each Host; empty for this machine),
`script` (what was submitted), `job` (process id of the batch script), `requeued` (how often).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import dropwhile
from pathlib import Path
from types import FrameType

from disttrain.testing.hosts import Host

CLUSTER = Path(os.environ["STAND_IN_CLUSTER"])


def machines() -> list[Host]:
    return [Host(**fields) for fields in json.loads((CLUSTER / "machines.json").read_text())]


def sbatch() -> int:
    script = sys.stdin.read()
    if "#SBATCH --partition=full" in script:
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    (CLUSTER / "script").write_text(script)
    print("17;cluster")
    return 0


def scontrol() -> int:
    if sys.argv[1:3] == ["show", "hostnames"]:
        print("\n".join(machine.address for machine in machines()) or "127.0.0.1")
        return 0
    assert sys.argv[1:] == ["requeue", "17"], sys.argv
    with (CLUSTER / "requeued").open("a") as file:
        file.write("17\n")
    return 0


def srun() -> int:
    """Every task on a machine of its own; signals go to all; the exit code is the highest."""
    command = list(dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    hosts = machines()
    tasks: list[subprocess.Popen[bytes]] = []
    received: list[int] = []  # passed on by the loop below: here, a task that is just being started would miss it

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGUSR1, receive)
    for node in range(int(os.environ["STAND_IN_NODES"])):
        environment = {**os.environ, "SLURM_NODEID": str(node)}
        tasks.append(
            hosts[node].start(command, env=environment) if hosts else subprocess.Popen(command, env=environment)
        )
    while any(task.poll() is None for task in tasks):
        while received:
            number = received.pop()
            for task in tasks:
                task.send_signal(number)
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "scontrol": scontrol, "srun": srun}[Path(sys.argv[0]).name]())
