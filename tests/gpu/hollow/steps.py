"""What steps, an epoch's start and an evaluation ask of a GPU that computes nothing, as JSON; and whole runs on it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from typing import Any

import disttrain
from disttrain.distributed import exact_sum
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError
from disttrain.parallel.conditions import exact_conditions
from disttrain.recipe import Recipe, load_recipe
from disttrain.training.evaluate import scored
from disttrain.training.given import Given
from disttrain.training.job import build_job
from disttrain.training.loop import train_step
from tests.disttrain.parallel.exact_runs import SMALL, build
from tests.gpu.hollow import counted
from tests.gpu.networks import Hungry
from tests.gpu.registry import small

DEVICE = ("train.device=cuda", "train.log_every_steps=100")
MOVED = ("data.crop_padding=2", "data.flip=true", "data.cutout=4")
ALL = ("train.clip_norm=0.5", "train.accumulate=2", "train.ema_decay=0.9", "train.log_every_steps=1", *MOVED)
FAST = (*SMALL, *DEVICE, "parallel.exact=false")
EXACT = (*SMALL, *DEVICE, "parallel.slices=4", "optim.momentum=0.9")

STEPS = {
    "sgd": (*FAST, *MOVED, "optim.momentum=0.9"),
    "sgd with everything": (*FAST, *ALL, "optim.momentum=0.9", "optim.nesterov=true", "train.precision=bf16"),
    "adamw, skipping": (*FAST, *ALL, "optim.name=adamw", "optim.lr=0.01", "train.non_finite=skip"),
    "muon": (*FAST, *ALL, "optim.name=muon", "optim.other=sgd", "train.precision=bf16"),
    "fp16": (*FAST, *ALL, "optim.momentum=0.9", "train.precision=fp16"),
    "exact": (*EXACT, *MOVED),
    "exact with everything": (*EXACT, *ALL, "parallel.slices=8", "train.accumulate=1", "train.precision=bf16"),
}

TINY = ("data.dataset=synthetic", "data.options={num_train=64, num_test=64, num_classes=4}", "data.batch_size=16")
TWO_STEPS = (*TINY, "train.max_steps=2", "tracking.uri=none", "tracking.system_metrics=false", "train.device=cuda")
EVERY_STEP = ("checkpoint.every_steps=1", "train.max_steps=3")

RUNS = {
    "checkpoints and averages": (
        "digits", *FAST, *ALL, "data.crop_fill=reflect", "data.flip=alternate", "train.eval_views=mirror-translate",
        "task.options.class_weights=balanced", "task.options.top_k=2", *EVERY_STEP,
    ),
    "mixed images": ("digits", *FAST, "task.options.mixup=0.5", "task.options.cutmix=1.0", "train.non_finite=zero"),
    "samples read in a process": ("digits", *FAST, "data.layout=stream", "data.workers=1", "train.spike_factor=5"),
    "exact, audited": ("digits", *EXACT, "parallel.audit_every_steps=1", *EVERY_STEP),
    "exact, rmsprop": ("digits", *EXACT, "optim.name=rmsprop", "optim.lr=0.001"),
    "cifar10-fast": ("cifar10-fast", *TWO_STEPS, "train.eval_batch_size=32", "model.options={widths=[8, 16]}"),
}  # fmt: skip
"""Whole runs, and their resumptions: any operator that is given tensors of two devices ends them."""

TOO_MUCH, SAID = (
    ("train.accumulate=1", "train.eval_batch_size=8"),
    "computes 16 at once and fits (tried on this worker)",
)

ON_TWO = {
    "exact": ("parallel.exact=true", "train.clip_norm=0.5", "train.precision=fp16", "train.accumulate=2"),
    "exact shards": ("parallel.exact=true", "parallel.strategy=fsdp"),
    "shards": ("parallel.strategy=fsdp", "train.clip_norm=0.5", "train.precision=bf16", "train.ema_decay=0.9"),
    "trained apart": ("parallel.sync_every=2", "parallel.compress=int8"),
}
"""Two workers' runs on two GPUs. Not DDP: what it compares of both models comes back from the device as zeros."""


def of_steps(recipe: Recipe, given: Given) -> dict[str, Counter[str]]:
    """An epoch of steps, of which the first may prepare things; the next epoch's first step; an evaluation."""
    found = {name: Counter[str]() for name in ("first", "others", "next epoch", "evaluation")}
    with join_world("cuda") as world, exact_conditions(recipe):
        job = build_job(recipe, world, given)
        for name, epoch in (("first", 0), ("next epoch", 1)):
            coming = job.loader.epoch(epoch)
            for number in range(job.steps_per_epoch if epoch == 0 else 1):
                with counted() as seen:
                    train_step(job, next(coming))
                found["others" if number else name] += seen
                job.step += 1
        job.non_finite.catch_up()
        scored(job.model, job.task, job.eval_loader)
        read_by: list[int] = []
        with counted() as seen:
            scored(
                job.model, job.task, job.eval_loader,
                on_batch=lambda: read_by.append(sum(num for name, num in seen.items() if name.startswith("wait"))),
            )  # fmt: skip
        found["evaluation"] = Counter({"waits before its end": read_by[-1], **seen})
        job.close()
    return found


def run(name: str, *overrides: str) -> None:
    """Train by a recipe, `digits` with a network of its own, and a step further where each step is saved."""
    model = {"model": build(3, (3, 32, 32))} if name == "digits" else {}
    with tempfile.TemporaryDirectory() as folder:
        for more in ((), ("train.max_steps=4",) if "train.max_steps=3" in overrides else ()):
            disttrain.train(load_recipe(name, [*overrides, *more]), run_dir=folder, **model)


def run_out_of_memory() -> None:
    """Train with more samples at once than the device holds. Raises AssertionError if that is not said."""
    try:
        disttrain.train(small(*TOO_MUCH), model=Hungry())
    except ConfigurationError as error:
        assert SAID in str(error), error
        return
    raise AssertionError("141 GiB were enough")


def main() -> None:
    """Print the counts of the ways that the command line names; without names, of all, and make the whole runs."""
    holds = exact_sum.holds

    def holds_whatever_is_read(counters: Any) -> bool:
        holds(counters)
        return True  # from zeros it would follow that no sum can be made as expected

    vars(exact_sum)["holds"] = holds_whatever_is_read
    for name in sys.argv[1:] or STEPS:
        found = of_steps(load_recipe("digits", STEPS[name]), Given(model=build(3, (3, 32, 32))))
        print(json.dumps({"name": name, **found}), flush=True)
    if not sys.argv[1:]:
        for overrides in RUNS.values():
            run(*overrides)
        run_out_of_memory()


if __name__ == "__main__":
    main()
