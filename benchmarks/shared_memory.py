"""What a step costs whose gradients meet in shared memory, against gloo alone.

    python benchmarks/shared_memory.py [--rounds 60] [--workers 2] [--hosts 2 --rate 100mbit]

Workers with one thread each train the network of `cifar10-net` on made-up images, batches of 100, in fast and in exact
mode; in each round a few steps one way and as many the other, in turn. Printed are medians per step, by the clock and
in processor time of worker 0, the median of the rounds' ratios with the quartiles, and whether both have the same
weights in the end, bit for bit.

With `--hosts`, which needs root on Linux, the workers are spread over so many simulated machines, joined by a link that
lets `--rate` pass in each direction; printed is also what the first machine sends in a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from here import here
from spread import quartiles
from torch import nn
from torch.nn import functional

from disttrain.distributed.world import World, join_world
from disttrain.models.net import Net
from disttrain.parallel.choose import parallelize
from disttrain.recipe import ParallelRecipe
from disttrain.testing import cluster, run_workers

UNITS = (("clock", 1e3, "ms"), ("processor", 1e3, "ms"), ("sent", 1e-3, "kB"))
BATCH, STEPS_PER_TURN, WARM_UP = 100, 5, 5
Spent = tuple[float, float, float]  # seconds by the clock, of the processor; bytes sent


def steps(world: World, *, exact: bool) -> Iterator[nn.Module]:
    """Makes a step each time, and gives the model."""
    torch.manual_seed(0)
    strategy = parallelize(Net(num_classes=10, sample_shape=(3, 32, 32)), world, ParallelRecipe(exact=exact, slices=4))
    torch.manual_seed(1 + world.rank)  # of equal numbers no order of additions would show
    optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(BATCH // world.size, 3, 32, 32).chunk(len(strategy.slices))
    labels = torch.randint(0, 10, (BATCH // world.size,)).chunk(len(strategy.slices))

    def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    for step in range(10**9):
        for index, batch in zip(strategy.slices, zip(images, labels, strict=True), strict=True):
            strategy.open_slice()
            loss = strategy.loss(loss_of, batch, num_samples=len(batch[1]))
            (loss / BATCH * strategy.loss_scale).backward()
            strategy.close_slice(index)
        strategy.finish_step(BATCH, step)
        optimizer.step()
        optimizer.zero_grad()
        yield strategy.model


def bytes_sent() -> int:
    """By this machine's interface to others; 0 if it has none."""
    lines = [line.partition(":") for line in Path("/proc/net/dev").read_text().splitlines()]
    return sum(int(counters.split()[8]) for name, _, counters in lines if name.strip() == "eth0")


def compare(rounds: int, exact: bool) -> tuple[list[tuple[Spent, Spent]], bool]:
    """Per step in each round, through gloo and in memory; and whether both have the same weights."""
    pairs: list[tuple[Spent, Spent]] = []
    with join_world("cpu", threads=1, most_sharing_memory=9) as world:
        assert world.sums is not None, "there is no memory to share here"
        ways = [steps(replace(world, sums=None), exact=exact), steps(world, exact=exact)]
        for way in ways:
            for _ in range(WARM_UP):
                next(way)
        for number in range(rounds):
            found: dict[int, Spent] = {}
            for index in (0, 1) if number % 2 else (1, 0):
                clock, processor, sent = time.perf_counter(), time.process_time(), bytes_sent()
                for _ in range(STEPS_PER_TURN):
                    next(ways[index])
                spent = time.perf_counter() - clock, time.process_time() - processor, bytes_sent() - sent
                found[index] = (spent[0] / STEPS_PER_TURN, spent[1] / STEPS_PER_TURN, spent[2] / STEPS_PER_TURN)
            pairs.append((found[0], found[1]))
        models = [next(way) for way in ways]
        same = all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
        dist.barrier()
    return pairs, same


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hosts", type=int)
    parser.add_argument("--rate", help="of the link between hosts, as tc has it")
    options = parser.parse_args()
    print(here())
    print(f"{options.workers} workers on {options.hosts or 1} machines, {options.rate or 'no'} limit between them")
    print(f"{'':<18}{'gloo':>14}{'in memory':>15}{'ratio':>8}{'quartiles':>16}{'same bits':>11}")
    for exact in (False, True):
        with ExitStack() as stack:
            machines = stack.enter_context(cluster(options.hosts)) if options.hosts else None
            for machine in machines or ():
                machine.limit(options.rate)
            pairs, same = run_workers(
                compare,
                options.workers,
                args=(options.rounds, exact),
                hosts=machines,
                process_group=False,
                timeout_s=900,
                check_collectives=False,
            )[0]
        for index, (what, factor, unit) in enumerate(UNITS):
            gloo, memory = (statistics.median(pair[way][index] for pair in pairs) * factor for way in (0, 1))
            if not gloo:
                continue
            low, middle, high = quartiles([b[index] / a[index] for a, b in pairs])
            print(
                f"{'exact' if exact else 'fast'}, {what:<11}{gloo:>11.2f} {unit}{memory:>12.2f} {unit}"
                f"{middle:>8.3f}{low:>9.3f}-{high:.3f}{'yes' if same else 'NO':>11}",
                flush=True,
            )


if __name__ == "__main__":
    main()
