"""How fast a step is: against a loop by hand, in exact mode, and how often it waits for the GPU. Run alone."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from disttrain.distributed.world import World, join_world
from disttrain.models import resnet18
from disttrain.parallel.conditions import exact_conditions
from disttrain.training.given import Given
from disttrain.training.job import Job, build_job
from disttrain.training.loop import train_step
from tests.gpu.registry import DEVICE, Answer, check, needs_gpu, small

HAS_GPU = DEVICE == "cuda"
BATCH, NUM_IMAGES, WARM, STEPS = (512, 51_200, 15, 50) if HAS_GPU else (4, 16, 0, 1)
OF_A_RESNET = (
    f"data.batch_size={BATCH}", "data.crop_padding=4", "data.flip=true", "model.name=resnet18", "optim.lr=0.05",
    "train.precision=bf16", "train.label_smoothing=0.1", "train.log_every_steps=1000000", "train.epochs=1000",
)  # fmt: skip
SGD = ("optim.momentum=0.9", "optim.nesterov=true", "optim.weight_decay=0.0005")  # unless another one is named
MUON = ("optim.name=muon", "optim.other=sgd")
FP16 = ("train.precision=fp16",)
ADAMW = ("optim.name=adamw", "optim.lr=0.001", "optim.weight_decay=0.01")
EXACT_8 = ("parallel.exact=true", f"parallel.slices={8 if HAS_GPU else 2}")


def made_up() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, (num, 3, 32, 32) uint8, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (NUM_IMAGES,), generator=generator)


def steps_of(world: World, *overrides: str) -> tuple[Job, Callable[[], None]]:
    """A job of ResNet-18 on images that stay on the device, and what makes its next step."""
    images, labels = made_up()
    names_another = any(override.startswith("optim.name=") for override in overrides)
    recipe = small(*OF_A_RESNET, *(() if names_another else SGD), *overrides)
    job = build_job(recipe, world, Given(train_set=(images, labels), test_set=(images[:BATCH], labels[:BATCH])))

    def batches() -> Iterator[Any]:
        while True:
            yield from job.loader.epoch(job.epoch)

    coming = batches()

    def step() -> None:
        train_step(job, next(coming))
        job.step += 1

    return job, step


def milliseconds(step: Callable[[], Any]) -> float:
    """Of a step: the least of three stretches, each begun and ended with an idle device."""
    for _ in range(WARM):
        step()
    found = []
    for _ in range(3 if HAS_GPU else 1):
        _finish()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        _finish()
        found.append((time.perf_counter() - began) / STEPS)
    return round(1e3 * min(found), 3)


def by_hand(*, channels_last: bool, compiled: bool) -> Callable[[], None]:
    """The loop that one would write for this one purpose: everything on the device, nothing waited for."""
    images, labels = (tensor.to(DEVICE) for tensor in made_up())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = resnet18().to(DEVICE).to(memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=HAS_GPU
    )

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return functional.cross_entropy(model(inputs), targets, label_smoothing=0.1)

    compute = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    rows, order, at = torch.arange(BATCH, device=DEVICE), torch.randperm(NUM_IMAGES, device=DEVICE), 0

    def step() -> None:
        nonlocal order, at
        if at == NUM_IMAGES:
            order, at = torch.randperm(NUM_IMAGES, device=DEVICE), 0
        chosen, at = order[at : at + BATCH], at + BATCH
        windows = functional.pad(images[chosen], (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)
        down, right = torch.randint(0, 9, (2, BATCH), device=DEVICE)
        cut = windows[rows, :, down, right]
        cut = torch.where((torch.rand(BATCH, device=DEVICE) < 0.5).view(-1, 1, 1, 1), cut.flip(-1), cut)
        inputs = ((cut.float() / 255 - 0.5) / 0.25).contiguous(memory_format=layout)
        compute(inputs, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@check(90, alone=True)
def how_often_a_step_waits_for_the_gpu() -> Answer:
    """Waits of a step by their places: none in fast mode, one in exact mode, whatever the number of slices."""
    needs_gpu()
    found, num_steps = {}, 5
    places: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        ours = [frame for frame in traceback.extract_stack() if "disttrain/" in frame.filename]
        places[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else f"{filename}:{lineno}"] += 1

    with join_world(DEVICE) as world:
        ways = {"fast": (), "fast, AdamW": ADAMW, "fast, Muon": MUON, "fast, fp16": FP16, "exact": EXACT_8}
        for name, overrides in ways.items():
            job, step = steps_of(world, *overrides)
            for _ in range(3):
                step()
            places.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = note
                torch.cuda.set_sync_debug_mode("warn")
                for _ in range(num_steps):
                    step()
                torch.cuda.set_sync_debug_mode("default")
            if name != "exact":
                torch.cuda.set_sync_debug_mode("error")  # as a step would have it that waits in a place of torch's own
                step()
                torch.cuda.set_sync_debug_mode("default")
            found[name] = {place: count / num_steps for place, count in sorted(places.items())}
            job.close()
    assert all(sum(places.values()) <= (name == "exact") for name, places in found.items()), found
    return found


@check(240, alone=True)
def a_step_against_one_by_hand() -> Answer:
    """Milliseconds of a step of ResNet-18, bf16, batch 512, and how much of the best by hand; nothing to pass."""
    found: Answer = {}
    ways = [(False, False), (True, False), (True, True)] if HAS_GPU else [(True, False)]
    for channels_last, compiled in ways:
        torch.backends.cudnn.benchmark = True
        name = f"by hand{', channels-last' * channels_last}{', compiled' * compiled}"
        found[name] = milliseconds(by_hand(channels_last=channels_last, compiled=compiled))
        torch.backends.cudnn.benchmark = False
        print(name, found[name], flush=True)
    with join_world(DEVICE) as world:
        layout = "train.channels_last=true"
        ours = {"disttrain": (), "disttrain, channels-last, compiled": (layout, "train.compile=true")}
        for name, overrides in (ours if HAS_GPU else {"disttrain, channels-last": (layout,)}).items():
            job, step = steps_of(world, *overrides)
            with exact_conditions(job.recipe):  # of fast mode: cuDNN's fastest kernels
                found[name] = milliseconds(step)
            print(name, found[name], flush=True)
            job.close()
    best = {side: min(ms for name, ms in found.items() if name.startswith(side)) for side in ("by hand", "disttrain")}
    return {**found, "of the best by hand": round(best["by hand"] / best["disttrain"], 3)}


@check(240, alone=True)
def what_exact_mode_costs() -> Answer:
    """Milliseconds of a step of ResNet-18, bf16, batch 512: in exact mode with 1 and 8 slices; nothing to pass.

    The 8 slices compiled, too, into CUDA graphs, of which each launches what would be some 600 kernels.
    """
    found: Answer = {}
    ways = {
        "fast": (), "exact, 1 slice": ("parallel.exact=true", "parallel.slices=1"), "exact, 8 slices": EXACT_8,
        "exact, 8 slices, graphs": (*EXACT_8, "train.compile=true", "train.compile_mode=reduce-overhead"),
    }  # fmt: skip
    with join_world(DEVICE) as world:
        for name, overrides in ways.items():
            if "graphs" in name and not HAS_GPU:
                continue
            job, step = steps_of(world, *overrides)
            with exact_conditions(job.recipe):
                found[name] = milliseconds(step)
            print(name, found[name], flush=True)
            job.close()
    exact = {name.removeprefix("exact, "): ms for name, ms in found.items() if name.startswith("exact")}
    return {**found, "exact / fast": {name: round(ms / found["fast"], 2) for name, ms in exact.items()}}


def _finish() -> None:
    """Wait until the device has done all that it was given."""
    if HAS_GPU:
        torch.cuda.synchronize()
