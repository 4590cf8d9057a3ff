"""How long a killed worker holds a run up, against a cold start.

    python benchmarks/restart.py [--rounds 5]

Each round starts `disttrain train digits -n 2 --max-restarts 1` as users do, timed from the command to the first step
in the journal. Then one of its workers gets SIGKILL, timed from there to the first step that was not in the journal.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from endless import OVERRIDES, newest_step
from here import here


def wait_for_step(run_dir: Path, step: int, launcher: psutil.Popen) -> None:
    """Until the journal has more than `step` of them."""
    while newest_step(run_dir) <= step:
        assert launcher.poll() is None, "the run ended too early"
        time.sleep(0.005)


def round_trip(run_dir: Path) -> tuple[float, float]:
    """(cold start, from the kill to the next new step), in seconds."""
    command = [
        sys.executable,
        "-m",
        "disttrain_launch",
        "train",
        "digits",
        *OVERRIDES,
        "-n",
        "2",
        "--max-restarts",
        "1",
    ]
    began = time.perf_counter()
    launcher = psutil.Popen([*command, "--run-dir", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(run_dir, 0, launcher)
        cold = time.perf_counter() - began
        wait_for_step(run_dir, 20, launcher)
        victim = launcher.children()[-1]
        killed = time.perf_counter()
        victim.kill()
        victim.wait()
        known = newest_step(run_dir)
        wait_for_step(run_dir, known, launcher)
        return cold, time.perf_counter() - killed
    finally:
        launcher.terminate()
        launcher.wait()


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(here())
    with tempfile.TemporaryDirectory() as folder:
        found = [round_trip(Path(folder, str(number))) for number in range(options.rounds + 1)][1:]
    for name, values in zip(("cold start", "after SIGKILL"), zip(*found, strict=True), strict=True):
        print(f"{name:<15}{statistics.median(values):.2f} s  ({min(values):.2f} to {max(values):.2f})")
    ratios = [restarted / cold for cold, restarted in found]
    print(f"{'ratio':<15}{statistics.median(ratios):.2f}    ({min(ratios):.2f} to {max(ratios):.2f}), at most 1.30")


if __name__ == "__main__":
    main()
