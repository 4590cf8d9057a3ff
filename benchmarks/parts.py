"""Microseconds of what our loop does in a step and the one by hand of step.py does not.

    python benchmarks/parts.py [--rounds 60] [--workers 1] [--exact]

Each part is called a hundred times in a row, so with its code and numbers in the caches, in the processor time of its
thread: the least of the rounds, as whatever else runs on the machine only adds to it. With `--exact` the parts are what
exact mode does with the gradients of a step of 4 slices: all of it, and its pieces.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch
from here import here
from parts_exact import EXACT, parts_of_exact
from step import recipe
from torch import nn

from disttrain import rng
from disttrain.distributed.world import join_world
from disttrain.health.nonfinite import marked
from disttrain.health.stop import stop_requests
from disttrain.task import named_at
from disttrain.testing import run_workers
from disttrain.training.backward import backward_from, constant_over
from disttrain.training.given import Given
from disttrain.training.job import StepResult
from disttrain.training.monitor import RunMonitor
from disttrain.training.optim import set_learning_rates
from disttrain.training.session import open_session
from disttrain.training.shortage import shortage_in_step

CALLS = 100


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
        with shortage_in_step(job):
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


def measure(rounds: int, exact: bool) -> dict[str, float]:
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
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--workers", default="1")
    parser.add_argument("--exact", action="store_true", help="what exact mode does with gradients")
    options = parser.parse_args()
    print(here())
    columns = [
        run_workers(measure, int(size), args=(options.rounds, options.exact), process_group=False, timeout_s=900)[0]
        for size in options.workers.split(",")
    ]
    for name in columns[0]:
        print(f"{name:<30}" + "".join(f"{column[name]:>10.1f}" for column in columns))


if __name__ == "__main__":
    main()
