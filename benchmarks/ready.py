"""What it costs to be ready for a lost worker, where none is lost: `on_lost_worker = "continue"` against "restart".

    python benchmarks/ready.py [--seconds 90] [--starts 2] [--recipe digits] [--null]
    python benchmarks/ready.py --calls

Trained are `digits`, and `cifar10-net` on images that are made up, in exact mode with four workers, as the launcher
starts them. Epochs of `cifar10-net` are 50 times as short as those of CIFAR-10, so there are 50 times as many
checkpoints. What readiness does in a step, an evaluation and a checkpoint is switched on and off within the same
processes, after each epoch, and is off in two workers while it is on in the other two. So where a process has its
memory counts for both alike, and so does what makes the machine slower for a while. Compared is the processor time of
all threads of the workers, in nanoseconds: that of the two that are ready to that of the others. A ratio is that of
four epochs, in which each worker was ready in two. Printed is their median, with an interval that has the true one with
a probability of 95 %; and the launcher's processor time, as a part of the workers': readiness has a part of that.

`--null` does the same with "restart" at all times: what is printed then is what the measurement itself is off by.
`--calls` counts calls, of Python's and of C's functions, on the main threads, and shows that a worker whose readiness
is off makes those of one that was started with "restart".
"""

from __future__ import annotations

import argparse
import math
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
from bounds import end
from spread import interval_of_median, quartiles
from switched import BLOCK, COUNTS, RECORDS, is_on

from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.workers import run_workers

HERE = Path(__file__).parent
WORKERS, MOST_RATIO = 4, 1.01
WARM_UP = CALLS_IN = 8  # blocks: after so many the order of on and off begins anew
RECIPE = ("parallel.exact=true", "tracking.uri=none", "tracking.system_metrics=false", "train.epochs=1000000")


@dataclass(frozen=True)
class Trained:
    """What is trained: in blocks of whole epochs, each with an evaluation and a checkpoint."""

    recipe: str
    block_steps: int
    overrides: tuple[str, ...] = ()


TRAINED = (
    Trained("digits", 23),
    Trained("cifar10-net", 10, ("data.dataset=synthetic", "data.options={num_train=1000,num_test=200}")),
)


def start(trained: Trained, policy: str, folder: Path, *, counts: bool = False) -> subprocess.Popen[bytes]:
    """A launcher and its workers, which write to a file each at the start of each block."""
    settled = (*RECIPE, *trained.overrides, f"parallel.on_lost_worker={policy}")
    words = [trained.recipe, "--run-dir", str(folder / "run"), *(word for one in settled for word in ("-o", one))]
    variables = {RECORDS: str(folder), BLOCK: str(trained.block_steps), COUNTS: "1" if counts else ""}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--launch", *words],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def launch(words: Sequence[str]) -> None:
    """Be the launcher: that of `disttrain train`, with another program for its workers."""
    logs = Path(os.environ[RECORDS], "run", "logs")
    logs.mkdir(parents=True)
    run_workers(WorkerGroup((str(HERE / "switched.py"), *words), WORKERS, log_dir=logs))


@dataclass(frozen=True)
class Spent:
    """What a worker spent in a block: processor time, and its launcher's, in seconds; calls."""

    seconds: float
    launcher_s: float
    calls: float


def blocks(
    trained: Trained, policy: str, seconds: float, *, most: float = math.inf, counts: bool = False
) -> list[list[Spent]]:
    """What the workers, by rank, spent in each block.

    Of so many seconds, or as many blocks as asked for at most, in whole fours, one at least; the first ones, which warm
    up, are left out.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = start(trained, policy, folder, counts=counts)
        records = [folder / str(rank) for rank in range(WORKERS)]
        deadline = math.inf
        try:
            while (number := _num_blocks(records)) < most and (number < 4 or time.monotonic() < deadline):
                if launcher.poll() is not None:
                    sys.exit((folder / "log").read_text())
                if number >= 0 and deadline == math.inf:
                    deadline = time.monotonic() + seconds
                time.sleep(0.5)
        finally:
            workers = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
            launcher.kill()  # and the workers end with it
            launcher.wait()
            psutil.wait_procs(workers, timeout=60)
        number = 4 * (_num_blocks(records) // 4)
        by_rank = []
        for record in records:
            lines = record.read_text().splitlines()[WARM_UP : WARM_UP + number + 1]
            moments = [[float(word) for word in line.split()] for line in lines]
            by_rank.append([Spent(*map(operator.sub, after, before)) for before, after in pairwise(moments)])
        return [list(of_ranks) for of_ranks in zip(*by_rank, strict=True)]


def _num_blocks(records: Sequence[Path]) -> int:
    """How many blocks all workers have made after those that warm up; negative before."""
    lines = min(record.read_bytes().count(b"\n") if record.exists() else 0 for record in records)
    return lines - 1 - WARM_UP


def ratios(of_blocks: Sequence[Sequence[Spent]]) -> list[float]:
    """Of the processor time with readiness to that without it, one for each four blocks."""
    result = []
    for first in range(0, len(of_blocks), 4):
        gain = 0.0
        for block in range(first, first + 4):
            ready, others = (
                sum(spent.seconds for rank, spent in enumerate(of_blocks[block]) if is_on(block, rank) is wanted)
                for wanted in (True, False)
            )
            gain += math.log(ready / others)  # where the first two are ready, and where they are not: twice each
        result.append(math.exp(gain / 4))
    return result


def compare(trained: Trained, asked: argparse.Namespace) -> bool:
    """Print how the processor times compare; whether the ratio keeps within the bound."""
    found: list[float] = []
    for number in range(asked.starts):
        of_blocks = blocks(trained, "restart" if asked.null else "continue", asked.seconds)
        of_start = ratios(of_blocks)
        launcher_s = sum(of_ranks[0].launcher_s for of_ranks in of_blocks)
        share = launcher_s / sum(spent.seconds for of_ranks in of_blocks for spent in of_ranks)
        words = f"median ratio {statistics.median(of_start):.4f} of {len(of_start)}, launcher {share:.2%}"
        print(f"{trained.recipe}, start {number + 1}: {words}", flush=True)
        found += of_start
    low, middle, high = quartiles(found)
    interval = interval_of_median(found)
    words = "too few for an interval" if interval is None else "95 %: {:.4f} to {:.4f}".format(*interval)
    is_met = middle <= MOST_RATIO
    print(
        f"{trained.recipe}: median ratio {middle:.4f} of {len(found)} ({words}; quartiles {low:.3f} to {high:.3f}); "
        f"at most {MOST_RATIO}: {'met' if is_met else 'NOT MET'}",
        flush=True,
    )
    return is_met


def count(trained: Trained) -> None:
    """Print the calls in a block, by rank."""
    turned = blocks(trained, "continue", math.inf, most=CALLS_IN, counts=True)
    restarting = blocks(trained, "restart", math.inf, most=CALLS_IN, counts=True)
    for rank in range(WORKERS):
        on, off = (
            statistics.median(spent[rank].calls for block, spent in enumerate(turned) if is_on(block, rank) is wanted)
            for wanted in (True, False)
        )
        restart = statistics.median(spent[rank].calls for spent in restarting)
        print(
            f"{trained.recipe}, rank {rank}, calls in {trained.block_steps} steps: on {on:.0f}, off {off:.0f}, "
            f'"restart" {restart:.0f}; on/off {on / off:.4f}, off/"restart" {off / restart:.4f}',
            flush=True,
        )


def main() -> None:
    """Read the command line, and measure."""
    if sys.argv[1:2] == ["--launch"]:
        launch(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=[trained.recipe for trained in TRAINED], help="both by default")
    parser.add_argument("--seconds", type=float, default=90.0, help="of each start")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--null", action="store_true")
    parser.add_argument("--calls", action="store_true")
    asked = parser.parse_args()
    chosen = [trained for trained in TRAINED if asked.recipe in (None, trained.recipe)]
    began = time.monotonic()
    is_met = True
    for trained in chosen:
        if asked.calls:
            count(trained)
        else:
            is_met &= compare(trained, asked)
    print(f"{time.monotonic() - began:.0f} s")
    end(is_met)


if __name__ == "__main__":
    main()
