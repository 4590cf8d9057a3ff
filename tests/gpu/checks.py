"""What has to hold on a GPU as it does on a CPU."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.distributed.fixed_point import FixedPointSum, magnitudes
from disttrain.distributed.world import join_world
from disttrain.health import stacks
from disttrain.health.finite import all_finite
from disttrain.parallel.conditions import environment_fingerprint
from disttrain.training.given import Given
from disttrain.training.job import build_job
from tests.gpu import networks
from tests.gpu.registry import (
    DEVICE,
    Answer,
    bits,
    check,
    in_a_process,
    logged,
    needs_gpu,
    small,
    trained,
)


@check(60)
def facts() -> Answer:
    """What the bits depend on here; nothing to pass but that it can be written down."""
    found = environment_fingerprint(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
    assert all(value is None or isinstance(value, str | int | float) for value in found.values()), found
    return found


@check(60)
def finite_check_of_every_type() -> Answer:
    """True for finite numbers, false for one NaN or infinity, in each type that a gradient has; none is changed."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64):
        tensors = [torch.randn(n, device=DEVICE).to(dtype) for n in (1, 1000, 70_001)]
        before = [tensor.clone() for tensor in tensors]
        assert all_finite(tensors), dtype
        assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True)), dtype
        for bad in (float("nan"), float("inf"), float("-inf")):
            tensors[2][70_000] = bad
            assert not all_finite(tensors), (dtype, bad)
    return {}


@check(60)
def sums_of_integers_are_those_of_the_cpu() -> Answer:
    """Magnitudes, integers and sums of exact mode: every bit, from denormals to 1e30."""
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-40, 1e-38, 1e-3, 1.0, 1e30):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            lists = [[(torch.randn(n, generator=generator) * scale).to(dtype) for n in (1, 7, 4096)] for _ in range(5)]
            largest = [max(column) for column in zip(*map(magnitudes, lists), strict=True)]
            integers, sums = [], []
            for device in ("cpu", DEVICE):
                there = [[tensor.to(device) for tensor in one] for one in lists]
                assert [magnitudes(one) for one in there] == [magnitudes(one) for one in lists], (scale, dtype)
                total = FixedPointSum(there[0], largest, 5)
                for one in there:
                    total.add(one)
                into = [torch.zeros_like(tensor) for tensor in there[0]]
                total.write(into)
                integers.append(total.integers().cpu())
                sums.append([tensor.cpu() for tensor in into])
            assert torch.equal(*integers), (scale, dtype)
            assert all(torch.equal(one, other) for one, other in zip(*sums, strict=True)), (scale, dtype)
    return {}


@check(90)
def batches_are_those_of_the_cpu() -> Answer:
    """An epoch with crops, flips and cutout: every bit."""
    epochs = []
    for device in ("cpu", DEVICE):
        recipe = small(f"train.device={device}", "data.crop_padding=4", "data.flip=true", "data.cutout=8")
        with join_world(device) as world:
            job = build_job(recipe, world, Given())
            parts = [part.data for batch in job.loader.epoch(1, 0) for part in batch.parts]
            epochs.append([[tensor.cpu() for tensor in data] for data in parts])
            job.close()
    for one, other in zip(*epochs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return {"batches": len(epochs[0])}


@check(200)
def trains_in_every_precision() -> Answer:
    """A loss that falls in float32, bf16, fp16, and with bfloat16 parameters; the checkpoint reads back."""
    found = {}
    ways = {precision: (f"train.precision={precision}",) for precision in ("fp32", "bf16", "fp16")}
    if DEVICE == "cpu":
        del ways["fp16"]
    ways["bf16 parameters"] = ("model.name=tests.gpu.networks:in_bfloat16",)
    for name, overrides in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            result = disttrain.train(small("train.epochs=5", *overrides), run_dir=folder)
            losses = logged(Path(folder), "train/loss")
            assert sum(losses[-4:]) < sum(losses[:4]), (name, losses)
            assert bits(Path(folder)).startswith(f"{result.step} ")
            found[name] = round(losses[-1] / losses[0], 3)
    return found


@check(200)
def deterministic_fast_mode_repeats_its_bits() -> Answer:
    """`train.deterministic`, in two processes; and whether fast mode does without it, which nothing promises."""
    found = {}
    for wanted in ("true", "false"):
        shas = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                code = trained(f"{folder}/run", f"train.deterministic={wanted}", "train.precision=bf16")
                shas.append(in_a_process(code))
        assert wanted == "false" or shas[0] == shas[1], shas
        found[f"deterministic={wanted}"] = "the same" if shas[0] == shas[1] else "others"
    return found


@check(120)
def a_bad_step_is_left_out_on_the_device() -> Answer:
    """Of eight steps the first, third and last have an infinite loss: they are skipped and reported, without trace."""
    found = {}
    muon = ("optim.name=muon", "optim.lr=0.01", "optim.other=sgd")
    fp16 = ("train.precision=fp16", "optim.momentum=0.9")  # whose scaler is to leave it to be seen later
    for options in (("optim.momentum=0.9",), ("optim.name=adamw", "optim.lr=0.001"), muon, fp16):
        with tempfile.TemporaryDirectory() as folder:
            recipe = small("train.non_finite=skip", "train.ema_decay=0.9", *options)
            disttrain.train(recipe, run_dir=folder, model=networks.Blows(at=(1, 3, 8)))
            lines = [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]
            skipped = [line["step"] for line in lines if line.get("name") == "non-finite"]
            newest = read_checkpoint(CheckpointStore(Path(folder) / "checkpoints").paths()[-1])
            tensors = [*newest.model.values(), *newest.optimizer.values()]
            assert skipped == [1, 3, 8], skipped
            assert all(bool(one.isfinite().all()) for one in tensors), "something of them is left"
            counts = [one.item() for name, one in newest.optimizer.items() if name.endswith(".step")]
            assert not counts or set(counts) == {5.0}, counts
            found[options[0]] = "left out"
    return found


@check(200)
def a_checkpoint_is_of_its_step_though_the_next_ones_compute() -> Answer:
    """Saved beside the training after each step, or where a run ends: the same bits."""
    shas = []
    for options in (("checkpoint.every_steps=1", "checkpoint.keep_last=99"), ("train.max_steps=6",)):
        with tempfile.TemporaryDirectory() as folder:
            code = trained(f"{folder}/run", "train.deterministic=true", "train.ema_decay=0.9", *options)
            in_a_process(code)
            step = read_checkpoint(Path(folder) / "run" / "checkpoints" / "step-00000006")
            shas.append((weights_sha256(step.model), weights_sha256(step.optimizer)))
    assert shas[0] == shas[1], shas
    return {}


@check(60)
def nccl_of_one_rank_ends_at_once() -> Answer:
    """Joining twice in a process, sums, and the way out."""
    needs_gpu()
    times = []
    for _ in range(2):
        with join_world("cuda") as world:
            one = torch.arange(5.0, device=world.device)
            torch.distributed.all_reduce(one)
            assert one.tolist() == [0, 1, 2, 3, 4]
            began = time.perf_counter()
        times.append(time.perf_counter() - began)
    assert max(times) < 5, times
    return {"teardown_s": times}


@check(60)
def a_rank_that_waits_for_its_gpu_counts_as_waiting() -> Answer:
    """What the watchdog makes of a main thread in the finite check, while the GPU is busy."""
    needs_gpu()
    gradients, seen, place = [torch.randn(1000, device="cuda")], [], SimpleNamespace(ident=threading.get_ident())
    all_finite(gradients)

    def look() -> None:
        import sys

        time.sleep(0.7)
        seen.append(stacks.waits_for_others(sys._current_frames()[place.ident]))

    thread = threading.Thread(target=look)
    thread.start()
    torch.cuda._sleep(int(4e9))  # type: ignore[no-untyped-call]  # two seconds
    all_finite(gradients)
    thread.join()
    assert seen == [True], seen
    return {}


@check(120)
def a_kernel_that_never_ends_is_ended() -> Answer:
    """The watchdog names step and stage, ends the process, and the GPU is free again."""
    needs_gpu()
    code = (
        "import os; os.environ['DISTTRAIN_LAUNCHER'] = 'a check'\n"
        "import disttrain, torch\n"
        "from tests.gpu.registry import small\n"
        "class Spins(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.inner = torch.nn.Linear(3072, 4); self.calls = 0\n"
        "    def forward(self, images):\n"
        "        self.calls += self.training and len(images) > 4\n"
        "        if self.calls == 4: torch.cuda._sleep(int(1.2e11))\n"
        "        return self.inner(images.flatten(1))\n"
        "disttrain.train(small('train.hang_timeout_s=6'), model=Spins())\n"
    )
    said = in_a_process(code, timeout_s=100)
    assert "no worker has made progress for 6 s" in said, said
    assert torch.ones(1, device="cuda").sum().item() == 1
    return {"said": said[:200]}


@check(150)
def memory_that_is_not_there_is_named() -> Answer:
    """What was asked for, and the train.accumulate that fits: it is then run, and half of it runs out of memory."""
    said = []
    for accumulate in (1, 2, 4):
        code = (
            "import disttrain, disttrain.errors\n"
            "from tests.gpu.networks import Hungry\n"
            "from tests.gpu.registry import small\n"
            f"recipe = small('train.accumulate={accumulate}', 'train.eval_batch_size=8')\n"
            "try: print(disttrain.train(recipe, model=Hungry()).step, 'steps')\n"
            "except disttrain.errors.DisttrainError as error: print(int(error.exit_code), error)\n"
        )
        said.append(in_a_process(code))
    for words, size in zip(said, (64, 32), strict=False):
        assert words.startswith(f"78 out of memory in step 1, with {size} samples computed at once: "), said
        assert "train.accumulate = 4, which computes 16 at once and fits (tried on this worker)" in words, said
    assert said[2] == "8 steps", said
    return {"said": said[0]}
