"""How long a run takes to its first step and from its last step to the prompt.

    python benchmarks/start.py [--rounds 5] [--workers 1,2] [--end]

`disttrain train digits` as users start it, launcher and all, from the command to the first step in its journal, against
`python -c "import torch, torchvision"`, in turn. With `--end`, from the last step in the journal to the end of the
command, for a run of forty epochs: the last evaluation, the last checkpoint, and MLflow's delivery to a database that
is new in each round. Printed are medians with the least and the most, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bounds import end

MOST, MOST_AT_THE_END_S = 1.3, 1.0
IMPORT = "import torch, torchvision"
ONE_STEP = ("train.log_every_steps=1", "train.max_steps=1")


def importing() -> float:
    """Seconds of the whole command."""
    began = time.time()
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
    return time.time() - began


def run(folder: Path, workers: int, overrides: tuple[str, ...], uri: str) -> tuple[float, float]:
    """Seconds from the command to the first step in the journal, and from the last one there to the command's end."""
    command = [sys.executable, "-P", "-m", "disttrain_launch", "train", "digits", "-n", str(workers)]
    words = [word for override in (*overrides, f"tracking.uri={uri}") for word in ("-o", override)]
    began = time.time()
    subprocess.run([*command, "--run-dir", str(folder / "run"), *words], check=True, capture_output=True)
    ended = time.time()
    rows = [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    steps = [row["time"] for row in rows if "train/loss" in row.get("metrics", {})]
    return steps[0] - began, ended - steps[-1]


def words(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def compare_starts(rounds: int, sizes: list[int]) -> bool:
    """Print the times to the first step; return whether they stay within the bound."""
    plain, ours = [], {size: list[float]() for size in sizes}
    for number in range(rounds + 1):
        seconds = importing()
        plain += [seconds] if number else []  # the first round fills caches
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                first = run(Path(folder), size, ONE_STEP, "none")[0]
            ours[size] += [first] if number else []
    print(f'python -c "{IMPORT}"   {words(plain)}')
    good = True
    for size, values in ours.items():
        ratio = statistics.median([one / base for one, base in zip(values, plain, strict=True)])
        name = f"to the first step, {size} worker{'s' * (size > 1):<1}"
        print(f"{name}   {words(values)}, ratio {ratio:.2f}, at most {MOST}", flush=True)
        good &= ratio <= MOST
    return good


def compare_ends(rounds: int, sizes: list[int]) -> bool:
    """Print the times from the last step; return whether they stay within the bound."""
    good = True
    for size in sizes:
        for kind in ("none", "MLflow"):
            taken = []
            for number in range(rounds + 1):
                with tempfile.TemporaryDirectory() as name:
                    uri = "none" if kind == "none" else f"sqlite:///{name}/mlflow.db"
                    # As many epochs as take longer than MLflow's start, 5 s of processor time on slow cores.
                    last = run(Path(name), size, ("train.log_every_steps=1", "train.epochs=40"), uri)[1]
                taken += [last] if number else []
            most = f", at most {MOST_AT_THE_END_S}"
            name = f"from the last step, {size} worker{'s' * (size > 1):<1}, tracking {kind:<7}"
            print(f"{name}{words(taken)}{most}", flush=True)
            good &= statistics.median(taken) <= MOST_AT_THE_END_S
    return good


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--end", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}")
    sizes = [int(size) for size in options.workers.split(",")]
    print(f"{options.rounds} rounds: median (least to most)")
    compare = compare_ends if options.end else compare_starts
    end(compare(options.rounds, sizes))


if __name__ == "__main__":
    main()
