"""The recipe `text-gpt` against a hand-written loop of the same model and batches.

    python benchmarks/text_gpt.py [--rounds 30] [--workers 1,2] [--cpu-time]

The loop is what people write: blocks of tokens in one tensor, `loss.backward()`, DistributedDataParallel with several
workers, clip, AdamW. It trains in the same processes as the recipe, a few steps at a time in turn, so that a machine
whose speed drifts does not favour one: fast, fast in parts as small as exact mode's slices (`train.accumulate`), which
is what smaller batches alone cost, and exact. Printed are the medians, the median of the rounds' ratios to the loop
with the quartiles, and whether the recipe and the loop have the same weights, bit for bit, in the end: they should in
fast mode with one worker, where nothing is summed in another order. On a machine that others use, too, `--cpu-time`
compares the processor time of worker 0 in place of the time that has passed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bounds import end
from here import here
from spread import quartiles
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from disttrain.checkpoint import weights_sha256
from disttrain.data import StepBatch
from disttrain.distributed.allocator import freed_memory_kept
from disttrain.distributed.world import World, join_world
from disttrain.parallel.conditions import exact_conditions
from disttrain.recipe import Recipe, load_recipe
from disttrain.rng import permutation
from disttrain.testing import run_workers
from disttrain.training.given import Given
from disttrain.training.job import Job, build_job
from disttrain.training.loop import train_step

COMMON = ("train.threads=1", "tracking.uri=none", "tracking.system_metrics=false")
# How many times as long as the loop each may take.
KINDS = {"fast": 1.05, "in parts": None, "exact": 1.3}
STEPS_PER_TURN = 4


def recipe(kind: str, num_workers: int) -> Recipe:
    """text-gpt as it ships."""
    exact = "true" if kind == "exact" else "false"
    slices = load_recipe("text-gpt").parallel.slices
    parts = max(1, slices // num_workers) if kind == "in parts" else 1
    return load_recipe("text-gpt", [*COMMON, f"parallel.exact={exact}", f"train.accumulate={parts}"])


def job_turns(job: Job) -> Iterator[None]:
    """A step each time."""

    def batches() -> Iterator[StepBatch]:
        for epoch in range(10**6):
            yield from job.loader.epoch(epoch)

    for batch in batches():
        with exact_conditions(job.recipe):
            train_step(job, batch)
        job.step += 1
        yield


@dataclass
class Loop:
    """The same by hand: what a script of one's own would hold."""

    model: nn.Module
    blocks: torch.Tensor
    end_of_text: int
    world: World
    learning_rate: Callable[[int], float]

    def steps(self, settings: Recipe) -> Iterator[None]:
        """A step each time."""
        model: nn.Module = DistributedDataParallel(self.model) if self.world.size > 1 else self.model
        optim = settings.optim
        betas = tuple(optim.options["betas"])
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=optim.lr, betas=betas, weight_decay=optim.options["weight_decay"]
        )
        size, step = settings.data.batch_size, 0
        for epoch in range(10**6):
            for chosen in permutation(settings.train.seed, epoch, len(self.blocks)).split(size):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate(step)
                share = chosen.tensor_split(self.world.size)[self.world.rank]
                tokens = self.blocks[share]
                inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
                documents = (inputs == self.end_of_text).cumsum(1)
                one_each = bool((documents == documents[:, :1]).all())
                logits = model(inputs) if one_each else model(inputs, documents=documents)
                loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                num_tokens = (self.blocks[chosen][:, 1:] != -100).sum()
                (loss / num_tokens * self.world.size).backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.train.clip_norm or 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                yield


def by_hand(job: Job) -> Loop:
    """A loop that begins where the job does."""
    tokens = [job.data.train.dataset[index]["tokens"] for index in range(len(job.data.train))]
    blocks = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)
    model = type(job.model)(**job.task.model_arguments(job.data.train), **job.recipe.model.options)
    model.load_state_dict(job.model.state_dict())
    return Loop(model, blocks, job.data.train.facts["end_of_text"], job.world, job.schedule.learning_rate)


def measure(rounds: int, cpu_time: bool) -> tuple[list[list[float]], list[str]]:
    """Seconds per step of each round (the loop, then the kinds), and the SHA-256 of the weights that each came to."""
    clock = time.process_time if cpu_time else time.perf_counter
    with freed_memory_kept(), join_world("cpu", threads=1, most_sharing_memory=2) as world:  # as in a run
        jobs = [build_job(recipe(kind, world.size), world, Given()) for kind in KINDS]
        loop = by_hand(jobs[0])
        sources = [loop.steps(jobs[0].recipe), *map(job_turns, jobs)]
        measured = []
        for _ in range(rounds + 1):
            taken = []
            for source in sources:
                began = clock()
                for _ in range(STEPS_PER_TURN):
                    next(source)
                taken.append((clock() - began) / STEPS_PER_TURN)
            measured.append(taken)
        return measured[1:], [weights_sha256(model.state_dict()) for model in (loop.model, *(j.model for j in jobs))]


def main() -> None:
    """Measure and print; exit as bounds.py has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    print(here())
    print(f"{'':<20}{'loop':>10}{'text-gpt':>10}{'ratio':>8}{'quartiles':>16}{'at most':>9}   same bits as the loop")
    good = True
    for size in map(int, options.workers.split(",")):
        arguments = (options.rounds, options.cpu_time)
        measured, digests = run_workers(
            measure, size, args=arguments, process_group=False, timeout_s=900, check_collectives=False
        )[0]
        loop, *others = zip(*measured, strict=True)
        for (kind, most), taken, digest in zip(KINDS.items(), others, digests[1:], strict=True):
            low, ratio, high = quartiles([b / a for a, b in zip(loop, taken, strict=True)])
            same = digest == digests[0]
            print(
                f"{kind + f', {size} worker' + 's' * (size > 1):<20}{statistics.median(loop) * 1e3:>7.1f} ms"
                f"{statistics.median(taken) * 1e3:>7.1f} ms{ratio:>8.3f}{low:>9.3f}-{high:.3f}{most or '':>9}"
                f"   {'yes' if same else 'no'} ({digest[:12]})",
                flush=True,
            )
            good &= ratio <= (most or ratio) and (same or size > 1 or kind != "fast")
    end(good)


if __name__ == "__main__":
    main()
