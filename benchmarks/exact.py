"""Exact mode against fast mode, and what it costs to resume.

    python benchmarks/exact.py steps [--rounds 30]      time per step, exact over fast, with two workers
    python benchmarks/exact.py resume [--rounds 5]      start to first new step, resumed over cold

`steps` builds both jobs in the same two workers, one thread each, and lets them train in turn, a few steps at a time,
so that a machine whose speed drifts does not favour one. Printed are the medians, the median of the rounds' ratios with
the quartiles; the ratio of fast mode in as many parts as exact mode has slices (`train.accumulate`), which is what
smaller batches alone cost, and that of exact mode over it; the ratio of exact mode with a slice for each worker
(`parallel.slices = 2`), whose batches are those of fast mode; and the bytes that each worker hands to the collectives
per step.

`resume` starts `disttrain train` as users do. A cold start is timed from the command to the first step in the journal;
then the job is killed with SIGKILL, started again, and timed from the command to the first step that was not there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bounds import end
from spread import quartiles

from disttrain.data import StepBatch
from disttrain.distributed.allocator import freed_memory_kept
from disttrain.distributed.world import join_world
from disttrain.parallel.conditions import exact_conditions
from disttrain.recipe import Recipe, load_recipe
from disttrain.testing import run_workers
from disttrain.training.given import Given
from disttrain.training.job import Job, build_job
from disttrain.training.loop import train_step

COMMON = ("train.threads=1", "tracking.uri=none", "tracking.system_metrics=false", "parallel.slices=4")
SYNTHETIC = ("data.dataset=synthetic", "data.options={num_train=2560, num_test=10}")
JOBS = {
    # name: overrides, steps per turn, most that exact mode may cost
    "net, batch 100": (("data.batch_size=100", "model.name=net"), 20, 1.30),
    "resnet18, batch 128": (("data.batch_size=128", "model.name=resnet18"), 1, 1.15),
}


# The ways to train: fast, exact, fast in as many parts as each of two workers has slices, and exact in one each.
WAYS = (
    ("parallel.exact=false",),
    ("parallel.exact=true",),
    ("parallel.exact=false", "train.accumulate=2"),
    ("parallel.exact=true", "parallel.slices=2"),
)


def recipe(*overrides: str) -> Recipe:
    """The tutorial's recipe on made-up images of CIFAR-10's size."""
    return load_recipe("cifar10-net", [*COMMON, *SYNTHETIC, *overrides])


def batches(job: Job) -> Iterator[StepBatch]:
    """Epoch after epoch."""
    for epoch in range(10**6):
        yield from job.loader.epoch(epoch)


def turn(job: Job, source: Iterator[StepBatch], steps: int) -> float:
    """Seconds per step."""
    with exact_conditions(job.recipe):
        began = time.perf_counter()
        for _ in range(steps):
            float(train_step(job, next(source)).losses.sum())
            job.step += 1
        return (time.perf_counter() - began) / steps


def bytes_per_step(job: Job) -> int:
    """What a worker hands to the collectives of a step."""
    weights = sum(parameter.numel() for parameter in job.model.parameters())
    floating = [buffer for buffer in job.model.buffers() if buffer.is_floating_point()]
    discrete = [buffer for buffer in job.model.buffers() if not buffer.is_floating_point()]
    buffers = sum(buffer.numel() for buffer in floating)
    counters = sum(buffer.numel() * buffer.element_size() for buffer in discrete)
    if job.strategy.bits_depend_on_world_size:
        return 4 * (weights + buffers) + counters  # DDP gives rank 0's buffers to all
    num_tensors = len(list(job.model.parameters())) + len(floating)
    return 8 * (weights + buffers + num_tensors + 2) + counters


def measure(overrides: tuple[str, ...], steps: int, rounds: int) -> tuple[list[list[float]], list[int]]:
    """Seconds per step of each of the `WAYS` in each round, and the bytes per step."""
    with freed_memory_kept(), join_world("cpu", threads=1, most_sharing_memory=2) as world:  # as in a run
        jobs = [build_job(recipe(*overrides, *way), world, Given()) for way in WAYS]
        sources = [batches(job) for job in jobs]
        measured = []
        for _ in range(rounds + 1):
            measured.append([turn(job, source, steps) for job, source in zip(jobs, sources, strict=True)])
        return measured[1:], [bytes_per_step(job) for job in jobs]


def compare_steps(rounds: int) -> bool:
    """Print the table; return whether every job stays within its bound."""
    print(
        f"{'':<22}{'fast':>10}{'exact':>10}{'ratio':>8}{'quartiles':>16}{'at most':>9}{'in parts':>10}{'exact/it':>10}"
        f"{'2 slices':>10}{'MB fast':>10}{'MB exact':>10}"
    )
    good = True
    for name, (overrides, steps, most) in JOBS.items():
        measured, sizes = run_workers(
            measure, 2, args=(overrides, steps, rounds), process_group=False, timeout_s=600, check_collectives=False
        )[0]
        fast, exact, *_ = (statistics.median(column) for column in zip(*measured, strict=True))
        low, ratio, high = quartiles([one[1] / one[0] for one in measured])
        in_parts, over_parts, two_slices = (
            statistics.median(one[way] / one[base] for one in measured) for way, base in ((2, 0), (1, 2), (3, 0))
        )
        print(
            f"{name:<22}{fast * 1e3:>7.1f} ms{exact * 1e3:>7.1f} ms{ratio:>8.3f}{low:>9.3f}-{high:.3f}{most:>9.2f}"
            f"{in_parts:>10.3f}{over_parts:>10.3f}{two_slices:>10.3f}{sizes[0] / 1e6:>10.2f}{sizes[1] / 1e6:>10.2f}",
            flush=True,
        )
        good &= ratio <= most
    return good


def first_new_step(run_dir: Path, overrides: list[str], known: int) -> tuple[float, subprocess.Popen[bytes]]:
    """Start the job; seconds until its journal holds a step beyond `known`, and the job, which goes on."""
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", "-n", "2", "--run-dir", str(run_dir)]
    began = time.perf_counter()
    job = subprocess.Popen(
        [*command, *(word for override in overrides for word in ("-o", override))],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while newest_step(run_dir) <= known:
        assert job.poll() is None, "the job ended too early"
        time.sleep(0.002)
    return time.perf_counter() - began, job


def newest_step(run_dir: Path) -> int:
    """The newest step in the journal."""
    path = run_dir / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if b"train/loss" in line and line[-1:] == b"\n"), default=0)


def compare_resume(rounds: int) -> bool:
    """Print the times; return whether resuming stays within its bound."""
    overrides = [*COMMON, "parallel.exact=true", "train.log_every_steps=1", "train.epochs=100000"]
    overrides += ["schedule.name=constant", "checkpoint.every_steps=1", "train.eval_every_epochs=100000"]
    colds, resumes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            run_dir = Path(folder, str(number))
            cold, job = first_new_step(run_dir, overrides, 0)
            while newest_step(run_dir) < 20:
                time.sleep(0.01)
            os.kill(job.pid, signal.SIGKILL)
            job.wait()
            time.sleep(2)  # the workers notice that their launcher has gone
            resumed, job = first_new_step(run_dir, overrides, newest_step(run_dir))
            job.terminate()
            job.wait()
            if number:  # the first round fills caches
                colds.append(cold)
                resumes.append(resumed)
    ratio = statistics.median(resumes) / statistics.median(colds)
    print(f"cold start   {statistics.median(colds):.2f} s  ({min(colds):.2f}-{max(colds):.2f})")
    print(f"resumed      {statistics.median(resumes):.2f} s  ({min(resumes):.2f}-{max(resumes):.2f})")
    print(f"ratio        {ratio:.2f}, at most 1.20")
    return ratio <= 1.2


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "resume"])
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}")
    good = compare_steps(options.rounds or 30) if options.what == "steps" else compare_resume(options.rounds or 5)
    end(good)


if __name__ == "__main__":
    main()
