"""What a step costs besides its arithmetic: our loop against one written by hand.

    python benchmarks/step.py [--rounds 60] [--workers 1,2] [--cpu-time] [-o key=value]

Trained is the network of `cifar10-net` on made-up images, batches of 100, with one worker and with two. The loop by
hand is what an expert writes for this one purpose: one uint8 tensor, whole batches, DistributedDataParallel. It runs
between the steps of the run itself, a few steps each in turn, so that a machine whose speed drifts does not favour one;
everything that a run does between two steps counts. Printed are medians, the median of the rounds' ratios with the
quartiles, and whether both have the same weights in the end, bit for bit. One worker has two threads, two have one
each. parts.py has what the difference consists of.

On a machine that others use, too, `--cpu-time` compares the processor time of worker 0, of all its threads, in place of
the time that has passed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from bounds import end
from here import here
from spread import quartiles
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import disttrain
from disttrain import rng
from disttrain.checkpoint import weights_sha256
from disttrain.data.sources.synthetic import synthetic_images
from disttrain.recipe import Recipe, load_recipe
from disttrain.testing import run_workers
from disttrain.training.job import Job, StepResult
from disttrain.training.monitor import RunMonitor

# As many images as CIFAR-10 has: a checkpoint is saved after an epoch, and after 50 steps it would count tenfold.
BATCH, NUM_IMAGES, STEPS_PER_TURN = 100, 50000, 20
MOST = 1.02  # so many times as long as the loop by hand
QUIET = ("tracking.uri=none", "data.dataset=synthetic", f"data.options={{num_train={NUM_IMAGES}, num_test=100}}")


def recipe(steps: int, threads: int, *more: str) -> Recipe:
    """cifar10-net as it ships, on made-up images."""
    epochs = -(-steps * BATCH // NUM_IMAGES)
    overrides = (f"train.max_steps={steps}", f"train.epochs={epochs}", f"train.eval_every_epochs={epochs}")
    shape = (f"train.threads={threads}", f"data.batch_size={BATCH}")
    return load_recipe("cifar10-net", [*QUIET, *overrides, *shape, *more])


def by_hand(model: nn.Module, settings: Recipe) -> Iterator[None]:
    """A step each time."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if size > 1 else model
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.optim.lr, momentum=0.9)
    split = synthetic_images(num_train=NUM_IMAGES, num_test=1).train
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.data.mean, settings.data.std))
    share = BATCH // size
    for epoch in range(10**6):
        order = rng.permutation(settings.train.seed, epoch, NUM_IMAGES)
        for start in range(rank * share, NUM_IMAGES, BATCH):
            chosen = order[start : start + share]
            images = split.images[chosen].float().div_(255).sub_(mean).div_(std)
            loss = functional.cross_entropy(net(images), split.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


class Turns:
    """Trains by hand between the steps of the run, and keeps the seconds per step of both, in pairs."""

    def __init__(self, settings: Recipe, clock: Callable[[], float]) -> None:
        self.settings, self.clock = settings, clock
        self.loop: Iterator[None] | None = None
        self.pairs: list[tuple[float, float]] = []
        self.digests: list[str] = []

    def after_step(self, job: Job) -> None:
        """After a few steps of the run, as many by hand."""
        if job.step % STEPS_PER_TURN:
            return
        ours = (self.clock() - self.began) / STEPS_PER_TURN if self.loop is not None else 0.0
        if self.loop is None:
            torch.manual_seed(self.settings.train.seed)
            self.model = type(job.model)(num_classes=10, sample_shape=(3, 32, 32))
            self.loop = by_hand(self.model, self.settings)
        began = self.clock()
        for _ in range(STEPS_PER_TURN):
            next(self.loop)
        self.pairs.append(((self.clock() - began) / STEPS_PER_TURN, ours))
        self.digests = [weights_sha256(model.state_dict()) for model in (self.model, job.model)]
        self.began = self.clock()


def compare(rounds: int, threads: int, cpu_time: bool, *more: str) -> tuple[list[tuple[float, float]], list[str]]:
    """Seconds per step of each round, by hand and ours, and the SHA-256 of the weights of both."""
    settings = recipe((rounds + 1) * STEPS_PER_TURN, threads, *more)
    turns = Turns(settings, time.process_time if cpu_time else time.perf_counter)
    made = RunMonitor.after_step

    def after_step(monitor: RunMonitor, result: StepResult | None, num_items: int) -> None:
        made(monitor, result, num_items)
        turns.after_step(monitor.job)

    # Not a hook: what it may look at is put together after each step, which a run without hooks does not do.
    RunMonitor.after_step = after_step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        disttrain.train(settings, run_dir=Path(folder, "run"))
    return turns.pairs[1:], turns.digests


def ratio(rounds: int, workers: list[int], cpu_time: bool, *more: str) -> bool:
    """Print the table; return whether each number of workers stays within the bound, with the same bits."""
    print(f"{'':<12}{'by hand':>11}{'disttrain':>11}{'ratio':>8}{'quartiles':>16}{'at most':>9}{'same bits':>11}")
    good = True
    for size in workers:
        arguments = (rounds, max(1, 2 // size), cpu_time, *more)
        pairs, digests = run_workers(
            compare, size, args=arguments, process_group=False, timeout_s=900, check_collectives=False
        )[0]
        hand, ours = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        low, middle, high = quartiles([b / a for a, b in pairs])
        same = digests[0] == digests[1]
        print(
            f"{f'{size} worker' + 's' * (size > 1):<12}{hand:>8.2f} ms{ours:>8.2f} ms{middle:>8.3f}"
            f"{low:>9.3f}-{high:.3f}{MOST:>9.2f}{'yes' if same else 'NO':>11}",
            flush=True,
        )
        good &= middle <= MOST and same
    return good


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="a key of the run")
    options = parser.parse_args()
    print(here())
    workers = [int(size) for size in options.workers.split(",")]
    end(ratio(options.rounds, workers, options.cpu_time, *options.overrides))


if __name__ == "__main__":
    main()
