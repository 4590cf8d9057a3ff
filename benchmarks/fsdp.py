"""Sharded training: memory of a worker, time of a step, bytes sent.

    python benchmarks/fsdp.py memory [--workers 4] [--layers 14] [--dim 768] [--exact]    100 million parameters
    python benchmarks/fsdp.py steps [--workers 2] [--layers 4] [--dim 128] [--rounds 20] [--slices 4]

`memory` trains a GPT with AdamW for three steps, each time in new processes: DDP, FSDP, FSDP in exact mode, with
`--exact` DDP in exact mode, too (which takes most). Printed are, of worker 0, the weights, gradients and optimizer
state that it holds when the optimizer has stepped, and the most main memory that the steps took beyond what the process
had before the model was built, both in bytes for each parameter and relative to DDP's.

`steps` lets a hand-written FSDP2 loop on the same batches, FSDP, FSDP in exact mode, and FSDP in as many parts as a
worker then has slices (`train.accumulate`) train in the same processes in turn, a step at a time, so that a machine
whose speed drifts does not favour one. Printed are the medians, and the medians of the rounds' ratios with the
quartiles: to the loop, of exact mode to fast mode, and of fast mode in parts to fast mode, which is what smaller passes
cost by themselves; and the bytes that a worker sends for gradients and weights in a step, as they follow from the
strategies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from spread import quartiles
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from disttrain.data import StepBatch
from disttrain.distributed.sharded import local
from disttrain.distributed.world import World, join_world
from disttrain.parallel.conditions import exact_conditions
from disttrain.parallel.fsdp import blocks_of
from disttrain.parallel.gathered import affordable_bytes
from disttrain.recipe import Recipe, load_recipe
from disttrain.testing import run_workers
from disttrain.training.given import Given
from disttrain.training.job import Job, build_job
from disttrain.training.loop import train_step

NUM_STEPS = 3


def recipe(layers: int, dim: int, strategy: str, *, exact: bool, slices: int = 4, accumulate: int = 1) -> Recipe:
    """text-gpt in another size, with short texts: what is measured is parameters."""
    return load_recipe(
        "text-gpt",
        [
            "train.threads=1",
            "tracking.uri=none",
            "tracking.system_metrics=false",
            f"parallel.slices={slices}",
            f"train.accumulate={accumulate}",
            "data.batch_size=8",
            "data.options.context_length=32",
            f"model.options={{num_layers={layers}, num_heads=4, dim={dim}}}",
            f"parallel.strategy={strategy}",
            f"parallel.exact={'true' if exact else 'false'}",
        ],
    )


def batches(job: Job) -> Iterator[StepBatch]:
    """Epoch after epoch."""
    for epoch in range(10**6):
        yield from job.loader.epoch(epoch)


def resident(field: str) -> int:
    """Of this process, in bytes: VmRSS is what it has in main memory, VmHWM the most that it had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(layers: int, dim: int, strategy: str, exact: bool) -> tuple[int, int, int]:
    """How many parameters there are, the bytes held after a step, and the most main memory beyond the start's."""
    with join_world("cpu", threads=1) as world:
        chosen = recipe(layers, dim, strategy, exact=exact)
        before = resident("VmRSS")
        job = build_job(chosen, world, Given())
        held = 0

        def look(*_: object) -> None:
            nonlocal held
            parameters = list(job.model.parameters())
            state = [one for of in job.optimizer.state.values() for one in of.values() if isinstance(one, torch.Tensor)]
            everything = [*parameters, *(one.grad for one in parameters if one.grad is not None), *state]
            held = sum(local(tensor.detach()).nbytes for tensor in everything)

        job.optimizer.register_step_post_hook(look)
        Path("/proc/self/clear_refs").write_text("5")  # forget the most until now: all have the whole at the start
        source = batches(job)
        for _ in range(NUM_STEPS):
            with exact_conditions(chosen):
                train_step(job, next(source))
            job.step += 1
        return sum(one.numel() for one in job.model.parameters()), held, resident("VmHWM") - before


def compare_memory(workers: int, layers: int, dim: int, *, with_exact_ddp: bool) -> None:
    """Print the table."""
    kinds = [("ddp", False), ("fsdp", False), ("fsdp", True), *([("ddp", True)] if with_exact_ddp else [])]
    reference: tuple[float, float] | None = None
    print(f"{'':<12}{'parameters':>12}{'held':>14}{'of DDP':>8}{'at most':>14}{'of DDP':>8}   bytes per parameter")
    for strategy, exact in kinds:
        words = ["memory", f"--workers={workers}", f"--layers={layers}", f"--dim={dim}", f"--only={strategy}"]
        answer = subprocess.run(  # new processes: what others have freed would be used again, and not be seen
            [sys.executable, __file__, *words, *(["--exact"] if exact else [])], stdout=subprocess.PIPE, check=True
        )
        num, held, most = json.loads(answer.stdout)
        per = held / num, most / num
        reference = reference or per
        name = f"{strategy}{', exact' if exact else ''}"
        print(
            f"{name:<12}{num / 1e6:>10.1f} M{per[0]:>14.2f}{per[0] / reference[0]:>8.2f}{per[1]:>14.2f}"
            f"{per[1] / reference[1]:>8.2f}",
            flush=True,
        )


def by_hand(job: Job, model: nn.Module, world: World) -> Iterator[None]:
    """The loop that people write with FSDP2, on the job's batches: a step each time."""
    mesh = init_device_mesh("cpu", (world.size,))
    for block in blocks_of(model).values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    settings = job.recipe.optim
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, **settings.options)  # type: ignore[arg-type]
    for batch in batches(job):
        (part,) = batch.parts
        loss = job.task.loss(model, part.data) / batch.global_weight
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def job_turns(job: Job) -> Iterator[None]:
    """A step each time."""
    for batch in batches(job):
        with exact_conditions(job.recipe):
            train_step(job, batch)
        job.step += 1
        yield


def steps(layers: int, dim: int, rounds: int, slices: int) -> tuple[int, int, list[tuple[float, ...]]]:
    """How many parameters there are and may stay gathered; of each round a step's seconds, in the order of the rows."""
    with join_world("cpu", threads=1) as world:
        plain, fast, exact, parts = (
            build_job(
                recipe(layers, dim, strategy, exact=is_exact, slices=slices, accumulate=accumulate), world, Given()
            )
            for strategy, is_exact, accumulate in (
                ("ddp", False, 1),
                ("fsdp", False, 1),
                ("fsdp", True, 1),
                ("fsdp", False, -(-slices // world.size)),
            )
        )
        num = sum(one.numel() for one in plain.model.parameters())
        kinds = [by_hand(plain, plain.model, world), *(job_turns(job) for job in (fast, exact, parts))]
        measured = []
        for _ in range(rounds + 2):
            times = []
            for kind in kinds:
                dist.barrier()
                began = time.perf_counter()
                next(kind)
                dist.barrier()
                times.append(time.perf_counter() - began)
            measured.append(tuple(times))
        return num, affordable_bytes(world) // 4, measured[2:]


def compare_steps(workers: int, layers: int, dim: int, rounds: int, slices: int) -> None:
    """Print the table."""
    num, affordable, measured = run_workers(
        steps, workers, args=(layers, dim, rounds, slices), process_group=False, timeout_s=900, check_collectives=False
    )[0]
    names = ("by hand", "fsdp", "fsdp, exact", "fsdp, parts")
    print(f"{num / 1e6:.1f} M parameters, {workers} workers, {slices} slices")
    for name, column in zip(names, zip(*measured, strict=True), strict=True):
        print(f"{name:<12}{statistics.median(column) * 1e3:>8.1f} ms")
    for name, ratios in (
        ("fsdp / by hand, at most 1.05", [fast / hand for hand, fast, _, _ in measured]),
        ("exact / fast, at most 1.30", [exact / fast for _, fast, exact, _ in measured]),
        ("in parts / fast", [parts / fast for _, fast, _, parts in measured]),
    ):
        low, ratio, high = quartiles(ratios)
        print(f"{name:<30}{ratio:.3f} ({low:.3f} to {high:.3f})")
    # Weights in forward and backward passes, of one slice or of this worker's; the root's once, which is left out here.
    # In exact mode those of a model that fits are gathered once for all slices.
    share, per_worker = (workers - 1) / workers, -(-slices // workers)
    gathered = 1 if per_worker > 1 and num <= affordable else 2 * per_worker
    print(f"sent by a worker, MB: fsdp {num * share * 12 / 1e6:.1f} (gradients {num * share * 4 / 1e6:.1f}), ", end="")
    sent = num * share * 4 * (gathered + per_worker) / 1e6
    print(f"exact {sent:.1f} (gradients {num * share * 4 * per_worker / 1e6:.1f})")


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "steps"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        arguments = (options.layers, options.dim, options.only, options.exact)
        print(json.dumps(run_workers(memory, options.workers, args=arguments, process_group=False, timeout_s=900)[0]))
        return
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}")
    if options.what == "memory":
        workers, layers, dim = options.workers or 4, options.layers or 14, options.dim or 768
        compare_memory(workers, layers, dim, with_exact_ddp=options.exact)
    else:
        compare_steps(options.workers or 2, options.layers or 4, options.dim or 128, options.rounds, options.slices)


if __name__ == "__main__":
    main()
