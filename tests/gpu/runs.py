"""Whole runs on a GPU: the same bits after a kill, with any number of workers and for a real network; stops and NaN."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.runs.journal import read_journal
from tests.gpu.registry import (
    DEVICE,
    EXACT,
    Answer,
    bits,
    check,
    exit_code,
    in_a_process,
    in_ranks,
    launcher,
    logged,
    needs_gpu,
    trained,
)

HAS_GPU = DEVICE == "cuda"


@contextmanager
def run_dirs(num: int) -> Iterator[list[str]]:
    """Paths for so many runs, which go with the block."""
    with tempfile.TemporaryDirectory() as folder:
        yield [f"{folder}/run-{number}" for number in range(num)]


@check(300)
def exact_mode_has_the_same_bits_with_any_number_of_workers() -> Answer:
    """One rank, and two to four that share the device by gloo: weights, momenta and statistics."""
    sizes = {"fp32": (2, 3, 4), "bf16": (3,)} if HAS_GPU else {"fp32": (3,), "bf16": (2,)}
    found = {}
    for precision in sizes:
        with run_dirs(5) as paths:
            overrides = (*EXACT, f"train.precision={precision}")
            alone = in_a_process(trained(paths[0], *overrides))
            for size in sizes[precision]:
                shared = in_ranks(size, trained(paths[size], *overrides))
                assert {alone} == set(shared), (precision, size, alone, shared)
            found[precision] = alone
    return found


@check(200)
def a_compiled_model_has_the_same_bits_in_exact_mode() -> Answer:
    """Bf16, dropout and BatchNorm, by one rank and by two, which meet other sizes; on a GPU as CUDA graphs."""
    mode = "reduce-overhead" if HAS_GPU else "default"
    network = "model.name=tests.gpu.networks:of_a_class_of_its_own"
    overrides = (
        *EXACT, network, "train.precision=bf16", "train.compile=true", f"train.compile_mode={mode}",
        "data.batch_size=62",
    )  # fmt: skip
    with run_dirs(3) as paths:
        alone = in_a_process(trained(paths[0], *overrides))
        shared = in_ranks(2, trained(paths[1], *overrides))
        assert {alone} == set(shared), (alone, shared)
        plain = in_a_process(trained(paths[2], *overrides, "train.compile=false"))
        assert plain != alone, "nothing was compiled"
    return {mode: alone}


@check(200)
def exact_mode_resumes_with_its_bits() -> Answer:
    """Eight steps at once; and five, a SIGKILL, and the rest: the same bits."""
    with run_dirs(2) as (whole, killed):
        saving = (*EXACT, "checkpoint.every_steps=2")
        die = (
            "import os, signal\n"
            "import disttrain.training.loop as loop\n"
            "real = loop.train_step\n"
            "def step(job, batch):\n"
            "    if job.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(job, batch)\n"
            "loop.train_step = step\n"
        )
        at_once = in_a_process(trained(whole, *saving))
        assert exit_code(die + trained(killed, *saving)) == -signal.SIGKILL
        steps = [read_checkpoint(path).state["step"] for path in CheckpointStore(Path(killed) / "checkpoints").paths()]
        assert 2 <= max(steps) <= 4, steps
        resumed = in_a_process(trained(killed, *saving))
        assert at_once == resumed, (at_once, resumed)
        return {"bits": at_once, "resumed from": max(steps)}


@check(250)
def a_resnet_has_the_same_bits_in_exact_mode() -> Answer:
    """ResNet-18 in bf16 with crops and flips, in two processes; on a GPU also torchvision's, which has pooling."""
    models = ("resnet18", "torchvision:resnet18") if HAS_GPU else ("resnet18",)
    size = (1536, 128, "") if HAS_GPU else (8, 8, "train.eval_batch_size=8")
    found = {}
    for model in models:
        with run_dirs(2) as paths:
            overrides = [f"data.options={{num_train={size[0]}, num_test=8, num_classes=10}}", *filter(None, size[2:])]
            overrides += [f"data.batch_size={size[1]}", "data.crop_padding=4", "data.flip=true", "train.epochs=1"]
            overrides += [f"model.name={model}", "train.precision=bf16", "optim.lr=0.05"]
            one, other = (in_a_process(trained(path, *EXACT, *overrides)) for path in paths)
            assert one == other, (model, one, other)
            found[model] = one
    return found


@check(120)
def the_bits_of_exact_mode_after_other_work() -> Answer:
    """After a product of matrices, before which cuBLAS has chosen its workspace; nothing to pass."""
    product = f"import torch\none = torch.ones(512, 512, device={DEVICE!r})\n(one @ one).sum().item()\n"
    with run_dirs(2) as paths:
        fresh = in_a_process(trained(paths[0], *EXACT))
        used = in_a_process(product + trained(paths[1], *EXACT))
    return {"bits": "the same" if fresh == used else f"others: {fresh}, {used}"}


@check(150)
def two_ranks_learn_what_one_does() -> Answer:
    """DistributedDataParallel of two ranks that share the device, a step without TF32: weights within 1e-5."""
    one_step = ("model.name=net", "train.max_steps=1", "optim.lr=0.1")
    without_tf32 = "import torch\ntorch.backends.cudnn.allow_tf32 = False\n"
    with run_dirs(2) as paths:
        in_a_process(without_tf32 + trained(paths[0], *one_step))
        in_ranks(2, without_tf32 + trained(paths[1], *one_step))
        one, two = (read_checkpoint(CheckpointStore(Path(path) / "checkpoints").paths()[-1]).model for path in paths)
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst < 1e-5, worst
    return {"largest difference": worst}


@check(120)
def every_policy_for_what_is_not_finite() -> Answer:
    """Two losses of NaN: stop ends with 70, names the step and has weights to resume from; skip and zero continue."""
    found = {}
    for policy in ("stop", "skip", "zero"):
        with run_dirs(1) as (path,):
            code = (
                "import disttrain, disttrain.errors\n"
                "from tests.gpu.registry import small\n"
                f"recipe = small('model.name=tests.gpu.networks:not_finite', 'train.non_finite={policy}')\n"
                f"try: print(disttrain.train(recipe, run_dir={path!r}).step, 'steps')\n"
                "except disttrain.errors.DisttrainError as error: print(int(error.exit_code), error)\n"
            )
            said = found[policy] = in_a_process(code)[:120]
            events = [record.get("name") for record in read_journal(Path(path) / "journal.jsonl")]
            if policy == "stop":
                assert said.startswith("70 "), said
                assert "is not finite at step 5" in said, said
                assert bits(Path(path)).startswith("4 "), bits(Path(path))
            else:
                assert (said, events.count("non-finite")) == ("8 steps", 2), (said, events)
    return found


@check(120)
def a_stop_saves_and_ends() -> Answer:
    """SIGTERM to the launcher in the middle of training: exit 75 within twenty seconds, and the checkpoint is there."""
    with run_dirs(1) as (path,):
        process = launcher(1, Path(path), "train.epochs=100000", "train.eval_every_epochs=100000")
        try:
            deadline = time.monotonic() + 90
            while not _has_begun(Path(path)):
                assert process.poll() is None, process.communicate()[0][-1000:]
                assert time.monotonic() < deadline, "training does not begin"
                time.sleep(0.1)
            began = time.monotonic()
            process.terminate()
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        took = time.monotonic() - began
        assert process.returncode == 75, (process.returncode, output[-1000:])
        assert not HAS_GPU or took < 20, took
        return {"seconds": round(took, 1), "step": int(bits(Path(path)).split()[0])}


def _has_begun(run_dir: Path) -> bool:
    return (run_dir / "journal.jsonl").exists() and bool(logged(run_dir, "train/loss"))


@check(60)
def what_has_no_deterministic_kernel_is_named() -> Answer:
    """In exact mode an adaptive pooling to 2x2 is refused before the first step, and one to 1x1 is taken."""
    needs_gpu()
    said = []
    for size in (1, 2):
        code = (
            "import torch, disttrain, disttrain.errors\n"
            "from tests.gpu.registry import EXACT, small\n"
            "n = torch.nn\n"
            f"pool, last = n.AdaptiveAvgPool2d({size}), n.Linear({8 * size**2}, 4)\n"
            "model = n.Sequential(n.Conv2d(3, 8, 3), pool, n.Flatten(), last)\n"
            "try: print(disttrain.train(small(*EXACT, 'train.max_steps=2'), model=model).step)\n"
            "except disttrain.errors.DisttrainError as error: print(int(error.exit_code), error)\n"
        )
        said.append(in_a_process(code))
    assert said[0] == "2", said
    assert said[1].startswith("78 "), said
    assert "adaptive_avg_pool2d_backward_cuda has no deterministic kernel" in said[1], said
    return {"said": said[1]}
