"""What a step costs besides its arithmetic: against a loop written by hand, and part by part.

    python benchmarks/step.py ratio [--rounds 60] [--workers 1,2] [--cpu-time] [-o key=value]
    python benchmarks/step.py parts [--rounds 60] [--workers 1] [--exact]

`ratio` trains the network of `cifar10-net` on made-up images, batches of 100, with one worker and with two. The loop by
hand is what an expert writes for this one purpose: one uint8 tensor, whole batches, DistributedDataParallel. It runs
between the steps of the run itself, a few steps each in turn, so that a machine whose speed drifts does not favour one;
everything that a run does between two steps counts. Printed are medians, the median of the rounds' ratios with the
quartiles, and whether both have the same weights in the end, bit for bit. One worker has two threads, two have one
each.

`parts` calls each thing that our loop does and the one by hand does not, and prints the microseconds of a call: the
least of the rounds, as whatever else runs on the machine only adds to them. With `--exact` they are what exact mode
does with the gradients of a step of 4 slices: all of it, and its parts.

On a machine that others use, too, `--cpu-time` compares the processor time of worker 0, of all its threads, in place of
the time that has passed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from spread import quartiles
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import disttrain
from disttrain import rng
from disttrain.checkpoint import weights_sha256
from disttrain.data.sources.synthetic import synthetic_images
from disttrain.distributed.collectives import sum_
from disttrain.distributed.fixed_point import FixedPointSum, expected_magnitudes, measured
from disttrain.distributed.world import join_world
from disttrain.health.nonfinite import marked
from disttrain.health.stop import stop_requests
from disttrain.parallel.exact.strategy import SlicesSummed
from disttrain.recipe import Recipe, load_recipe
from disttrain.task import named_at
from disttrain.testing import run_workers
from disttrain.training.backward import backward_from, constant_over
from disttrain.training.given import Given
from disttrain.training.job import Job, StepResult
from disttrain.training.monitor import RunMonitor
from disttrain.training.optim import set_learning_rates
from disttrain.training.session import open_session
from disttrain.training.shortage import shortage_in_step

# As many images as CIFAR-10 has: a checkpoint is saved after an epoch, and after 50 steps it would count tenfold.
BATCH, NUM_IMAGES, STEPS_PER_TURN, CALLS = 100, 50000, 20, 100
EXACT = ("parallel.exact=true", "parallel.slices=4")
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


def parts_of(monitor: RunMonitor) -> dict[str, Callable[[], object]]:
    """What our loop calls in a step, and the loop by hand does not; the forward and backward pass do nothing here."""
    job = monitor.job
    model, strategy, settings = job.model, job.strategy, job.recipe.train
    batches = (batch for epoch in range(10**6) for batch in job.loader.epoch(epoch))
    batch = next(batches)
    images, labels = job.data.train.images, job.data.train.labels
    chosen = batch.parts[0].samples
    losses = torch.zeros(strategy.num_slices)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def plain_batch() -> None:
        one = images[chosen].float().div_(255).sub_(0.5).div_(0.5)
        assert len(one) == len(labels[chosen])

    def share() -> None:
        loss = leaf * 1.0
        weight = max(1, batch.global_weight)
        one = loss.detach() / weight
        start = constant_over(weight, strategy.loss_scale, one.shape, one.dtype, one.device)
        backward_from(loss, marked(start, one))
        losses[0].add_(one)

    def in_contexts() -> None:
        with named_at(job.task, "loss", f" at step {job.step + 1}"), job.computing:
            pass

    def notes() -> None:
        job.progress.at("loading data", job.step)
        compiles = job.compiles_in("training", (len(part.samples) for part in batch.parts))
        job.progress.at("computing the next step", job.step, patient=compiles)

    def short() -> None:
        with shortage_in_step(job, batch):
            pass

    def after() -> None:
        monitor.after_step(None, batch.global_weight)

    job.step = 1  # at an epoch's end more is done
    leaf = torch.ones((), requires_grad=True)
    return {
        "a batch": lambda: next(batches),
        "a batch by hand": plain_batch,
        "notes for the watchdog": notes,
        "out of memory named": short,
        "unfreezing": strategy.follow_unfreezing,
        "learning rate": lambda: set_learning_rates(job.optimizer, job.schedule, job.step),
        "buffers kept": job.non_finite.begin_step,
        "losses": lambda: torch.zeros(strategy.num_slices, device=job.world.device),
        "seeds": lambda: rng.seed_layers(job.world.device, settings.seed, job.step, 0),
        "contexts of the loss": in_contexts,
        "share of the loss, backward": share,
        "backward by hand": lambda: (leaf * 1.0).backward(),
        "finite check": lambda: job.non_finite.check(job.step, batch, losses),
        "norm": lambda: nn.utils.get_total_norm([one.grad for one in model.parameters()]),
        "scaler": lambda: (job.scaler.unscale_(job.optimizer), job.scaler.update()),
        "optimizer by the scaler": lambda: job.scaler.step(job.optimizer),
        "optimizer": lambda: job.optimizer.step(),
        "result": lambda: StepResult(losses, None),
        "after the step": after,
        "agreement": lambda: monitor._agreement.ask(False, False),
        "progress": lambda: monitor.console.progress(3, 1, 2),
        "poll": monitor.saver.poll,
    }


def parts_of_exact(monitor: RunMonitor) -> dict[str, Callable[[], object]]:
    """What exact mode does with the gradients of a step, which are zeros here, so that their sums are, too."""
    job = monitor.job
    strategy, world = job.strategy, job.world
    assert isinstance(strategy, SlicesSummed)
    parameters = list(job.model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    lists = [gradients] * len(strategy.slices)
    bounds = [0.0] * len(gradients)
    integers = torch.zeros(sum(map(torch.numel, gradients)), dtype=torch.int64)
    total = FixedPointSum(gradients, bounds, strategy.num_slices)

    def slices() -> None:
        for index in strategy.slices:
            strategy.open_slice()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            strategy.close_slice(index)

    def as_integers() -> None:
        FixedPointSum(gradients, bounds, strategy.num_slices, integers).add(*lists)

    def step() -> None:
        slices()
        strategy.finish_step(BATCH, 0)

    def slices_alone() -> None:
        slices()
        strategy._sums._begin_step()

    return {
        "slices, and their sum": step,
        "slices opened and closed": slices_alone,
        "their magnitudes": lambda: measured(lists),
        "their integers": as_integers,
        "integers summed": lambda: (sum_ if world.sums is None else world.sums.sum_)(integers),
        "numbers again": lambda: total.write(gradients),
        "the next step's bounds": lambda: expected_magnitudes(gradients, bounds),
    }


def measure_parts(rounds: int, exact: bool) -> dict[str, float]:
    """Microseconds of a call of each part."""
    settings = recipe(100, 1, *(EXACT if exact else ()))
    found: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        stop_requests() as stop,
        join_world("cpu", threads=1, most_sharing_memory=2) as world,
        suppress(_Measured),
        open_session(settings, world, Path(folder, "run"), Given(), stop) as monitor,
    ):
        calls = (parts_of_exact if exact else parts_of)(monitor)
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.thread_time()
                for _ in range(CALLS):
                    call()
                taken = (time.thread_time() - began) / CALLS * 1e6
                found[name] = min(found.get(name, taken), taken)
        raise _Measured
    return found


class _Measured(Exception):
    """Leaves a session that has not trained."""


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ratio", "parts"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--exact", action="store_true", help="for `parts`: what exact mode does with gradients")
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="a key of the run, for `ratio`")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}")
    workers = [int(size) for size in options.workers.split(",")]
    if options.what == "ratio":
        sys.exit(0 if ratio(options.rounds, workers, options.cpu_time, *options.overrides) else 1)
    columns = [
        run_workers(measure_parts, size, args=(options.rounds, options.exact), process_group=False, timeout_s=900)[0]
        for size in workers
    ]
    for name in columns[0]:
        print(f"{name:<30}" + "".join(f"{column[name]:>10.1f}" for column in columns))


if __name__ == "__main__":
    main()
