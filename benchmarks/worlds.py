"""Worlds of up to 16 machines on slow links: bytes and seconds per step, measured and by the model, side by side.

    python benchmarks/worlds.py [--sites 2 8 16] [--rates 1gbit 100mbit 10mbit] [--every 50] [--fragments 4]
    python benchmarks/worlds.py --predict [--numbers 1e9] [--sites 16] [--rates 100mbit] [--latency 0.05]

Needs root on Linux. Each machine is a network namespace with one worker, joined by links that let a rate pass in each
direction. What is trained is eight linear layers on one sample, so that there is next to no computation: the machines
share this one's cores, and only what the network does is as it would be. Measured are the bytes that a machine's
interface sends, the most of them within one step, and the seconds of a step, the slowest worker's.

The model (cost.py) is derived, not fitted. What it takes from the machine is measured beside it, without the quantity
that is compared: the computation of a step in which nobody meets, and the latency of a message, from all-reduces of one
number. Printed is a row for each world, rate and way. With `--predict` nothing is measured: it prints what the model
says of 1000 steps of a model of so many numbers, without the computation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cost import Way, ways
from here import has_machines, here
from torch import nn

from disttrain.distributed.collectives import sum_
from disttrain.distributed.world import join_world
from disttrain.parallel.choose import parallelize
from disttrain.recipe import ParallelRecipe
from disttrain.testing import cluster, workers

WIDTH, LAYERS = 256, 8
NUM_NUMBERS = WIDTH * WIDTH * LAYERS
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MESSAGES = 5  # all-reduces of one number, for the latency


@dataclass(frozen=True)
class Measured:
    """One worker's: bytes and seconds of all steps, the most bytes in one step, seconds of a step without a meeting."""

    num_bytes: int
    peak_bytes: int
    seconds: float
    computation_s: float


def bits_per_s(rate: str) -> float:
    """Of a rate as tc has it."""
    return float(rate[:-4]) * BITS[rate[-4:]]


def recipe_of(name: str, way: Way) -> ParallelRecipe:
    """What trains in that way."""
    compress = name if name == "bf16" else "int8" if "int8" in name else "none"
    if way.every == 1:
        return ParallelRecipe(compress=compress)
    return ParallelRecipe(compress=compress, sync_every=way.every, sync_fragments=way.fragments, outer_momentum=0.0)


def bytes_sent() -> int:
    """By this machine's interface, since it was made."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("eth0:"))


def latency() -> float:
    """Seconds of a message, from all-reduces of one number around the ring."""
    with join_world("cpu", threads=1) as world:
        number = torch.zeros(1)
        sum_(number)
        taken = []
        for _ in range(MESSAGES):
            start = time.perf_counter()
            sum_(number)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken) / (2 * (world.size - 1))


def train(recipe: ParallelRecipe, num_steps: int) -> Measured:
    """Train so many steps, in whatever world this process is."""
    with join_world("cpu", threads=1) as world:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        strategy = parallelize(model, world, recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        rows = torch.ones(1, WIDTH)
        sent, seconds, alone = [], [], []
        begin = -1 if not recipe.sync_every else 0  # DDP arranges its sums anew after its first step
        for step in range(begin, num_steps):
            if step == 0:
                sum_(torch.zeros(1))
                before = first = bytes_sent()
            start = time.perf_counter()
            strategy.follow_unfreezing()
            strategy.open_slice()
            strategy.loss(lambda module, batch: module(batch).square().sum(), rows, num_samples=1).backward()
            strategy.close_slice(world.rank)
            strategy.finish_step(world.size, step)
            optimizer.step()
            optimizer.zero_grad()
            meets = strategy.meets_after(step)
            if meets:
                strategy.meet_(step)
            taken = time.perf_counter() - start
            if step < 0:
                continue
            seconds.append(taken)
            now = bytes_sent()
            sent.append(now - before)
            before = now
            if recipe.sync_every and not meets:
                alone.append(taken)
        sum_(torch.zeros(1))
        return Measured(bytes_sent() - first, max(sent), sum(seconds), statistics.mean(alone) if alone else 0.0)


def measured(sites: int, rates: list[str], chosen: dict[str, Way], num_steps: dict[bool, int]) -> None:
    """Print the rows of one world."""
    with cluster(sites) as machines, workers(sites, timeout_s=600, process_group=False, hosts=machines) as group:
        for rate in rates:
            for machine in machines:
                machine.limit(rate)
            latency_s = max(group.run(latency))
            found = {}
            for name, way in chosen.items():
                found[name] = group.run(train, recipe_of(name, way), num_steps[way.every > 1])
            computation_s = statistics.mean(
                one.computation_s for of_way in found.values() for one in of_way if one.computation_s
            )
            for name, way in chosen.items():
                steps, of_way = num_steps[way.every > 1], found[name]
                per_step = statistics.mean(one.num_bytes for one in of_way) / steps
                peak = statistics.mean(one.peak_bytes for one in of_way)
                seconds = max(one.seconds for one in of_way) / steps
                expected = way.bytes_per_step(NUM_NUMBERS, sites)
                by_model = way.seconds_per_step(
                    NUM_NUMBERS,
                    sites,
                    bits_per_s=bits_per_s(rate),
                    latency_s=latency_s,
                    computation_s=computation_s,
                )
                print(
                    f"| {sites} | {rate} | {name} | {per_step:,.0f} | {expected:,.0f} | {expected / per_step - 1:+.1%} "
                    f"| {peak:,.0f} | {1000 * seconds:,.1f} | {1000 * by_model:,.1f} | {by_model / seconds - 1:+.0%} |",
                    flush=True,
                )
            print(f"<!-- computation {1000 * computation_s:.2f} ms, latency {1000 * latency_s:.2f} ms -->", flush=True)


def predict(options: argparse.Namespace, all_ways: dict[str, Way]) -> None:
    """Print what the model says."""
    print("| sites | rate | way | sent by each per step | at once | hours per 1000 steps |\n|---|---|---|---|---|---|")
    for sites in options.sites:
        for rate in options.rates:
            for name, way in all_ways.items():
                hours = (
                    1000
                    / 3600
                    * way.seconds_per_step(
                        options.numbers,
                        sites,
                        bits_per_s=bits_per_s(rate),
                        latency_s=options.latency,
                        computation_s=0.0,
                    )
                )
                sent, peak = way.bytes_per_step(options.numbers, sites), way.peak_bytes(options.numbers, sites)
                print(f"| {sites} | {rate} | {name} | {sent / 1e6:,.1f} MB | {peak / 1e6:,.0f} MB | {hours:,.2f} |")


def main() -> None:
    """Measure, or predict, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", nargs="+", type=int, default=[2, 8, 16])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit", "10mbit"])
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--fragments", type=int, default=4)
    parser.add_argument(
        "--ways", nargs="+", metavar="WAY", help="by default all; measured: one of outer steps at least"
    )
    parser.add_argument("--steps", type=int, default=5, help="of gradients; outer steps take two rounds of --every")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--numbers", type=float, default=1e9)
    parser.add_argument("--latency", type=float, default=0.05)
    options = parser.parse_args()
    all_ways = ways(options.every, options.fragments)
    if unknown := {*(options.ways or all_ways)} - all_ways.keys():
        parser.error(f"--ways {min(unknown)!r}: there are {', '.join(map(repr, all_ways))}")
    chosen = {name: way for name, way in all_ways.items() if options.ways is None or name in options.ways}
    if options.predict:
        predict(options, chosen)
        return
    if all(way.every == 1 for way in chosen.values()):
        parser.error(
            "a step's computation is measured where nobody meets: --ways needs one of outer steps, --every 2 or more"
        )
    if not has_machines():
        return
    print(here())
    print(f"{NUM_NUMBERS:,} numbers; bytes sent by each machine per step, milliseconds per step\n")
    print("| sites | rate | way | bytes | by the model | off | most in a step | ms | by the model | off |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for sites in options.sites:
        measured(sites, options.rates, chosen, {False: options.steps, True: 2 * options.every})


if __name__ == "__main__":
    main()
