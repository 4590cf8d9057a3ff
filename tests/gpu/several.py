"""What takes several GPUs, for whoever has them: `python -m tests.gpu.two_gpus`; in a trial on the CPU gloo."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.gpu.networks import FAULT
from tests.gpu.registry import DEVICE, Answer, SkippedError, bits, check, launched, logged

HAS_GPU = DEVICE == "cuda"
EXACT_8 = ("parallel.exact=true", "parallel.slices=8")
LONG_AGO_S = 120  # NCCL's own limit is ten minutes


def sizes() -> list[int]:
    """Numbers of workers that this machine has GPUs for, the largest last. Raises SkippedError for less than two."""
    found = [size for size in (1, 2, 4, 8) if size <= (torch.cuda.device_count() if HAS_GPU else 2)]
    if len(found) < 2:
        raise SkippedError("needs two GPUs")
    return found


def _failed(fault: str, *overrides: str) -> Answer:
    """How all workers end, and when, after a fault of the last one."""
    size = sizes()[-1]
    with tempfile.TemporaryDirectory() as folder:
        run_dir, network = Path(folder) / "run", "model.name=tests.gpu.networks:faulty"
        ended = launched(size, run_dir, network, *overrides, variables={FAULT: fault}, timeout_s=200)
    assert ended.seconds < LONG_AGO_S, ended
    return {"code": ended.code, "seconds": ended.seconds, "said": ended.output.strip().splitlines()[-1]}


@check(220, several=True)
def a_rank_that_raises_ends_the_job() -> Answer:
    """Its line is the one shown, at once: the others wait for it in a collective."""
    found = _failed("raise")
    assert found["code"] == 78, found
    assert "a fault on purpose" in found["said"], found
    return found


@check(220, several=True)
def a_rank_that_dies_ends_the_job() -> Answer:
    """The signal and the rank are named."""
    found = _failed("die")
    assert found["code"] == 1, found
    assert "SIGKILL" in found["said"], found
    return found


@check(220, several=True)
def a_rank_that_hangs_is_named() -> Answer:
    """That rank alone, though all the others wait for it."""
    found, last = _failed("hang", "train.hang_timeout_s=15"), sizes()[-1] - 1
    assert found["code"] == 1, found
    assert f"rank {last} on " in found["said"], found
    assert "rank 0 on " not in found["said"], found
    return found


@check(400, several=True)
def exact_mode_has_the_same_bits_on_all_gpus() -> Answer:
    """1, 2, 4 and 8 workers: weights, momenta and statistics."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes():
            ended = launched(size, Path(folder) / str(size), *EXACT_8)
            assert ended.code == 0, ended.output[-2000:]
            found[size] = bits(Path(folder) / str(size))
    assert len(set(found.values())) == 1, found
    return {"workers": list(found), "bits": found[1]}


@check(300, several=True)
def fsdp_learns_and_is_resumed_by_one_worker() -> Answer:
    """Shards over all GPUs: a loss that falls, a checkpoint that one worker resumes; then all, from main memory."""
    sharded, offloaded = "parallel.strategy=fsdp", ("parallel.cpu_offload=true", "parallel.prefetch=1")
    with tempfile.TemporaryDirectory() as folder:
        run_dir, seen = Path(folder) / "run", []
        for size, epochs, *overrides in ((sizes()[-1], 3, sharded), (1, 4), (sizes()[-1], 5, sharded, *offloaded)):
            ended = launched(size, run_dir, f"train.epochs={epochs}", *overrides)
            assert ended.code == 0, ended.output[-2000:]
            seen.append(int(bits(run_dir).split()[0]))
        losses = logged(run_dir, "train/loss")
    assert seen == [12, 16, 20], seen
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    return {"losses": [round(losses[0], 3), round(losses[-1], 3)]}


@check(400, several=True)
def speed_per_gpu() -> Answer:
    """Images per second and GPU of ResNet-18 in bf16, 512 for each GPU, by the journal; nothing to pass."""
    found: Answer = {}
    for way, overrides in (("fast", ()), ("exact", EXACT_8)):
        for size in sizes():
            batch = (512 if HAS_GPU else 4) * size
            options = f"data.options={{num_train={batch * (40 if HAS_GPU else 2)}, num_test=64, num_classes=10}}"
            resnet = (options, f"data.batch_size={batch}", "train.precision=bf16", "train.log_every_steps=10")
            network = ("model.name=resnet18",) if HAS_GPU else ()
            with tempfile.TemporaryDirectory() as folder:
                ended = launched(size, Path(folder) / "run", *resnet, *network, *overrides, timeout_s=300)
                assert ended.code == 0, ended.output[-2000:]
                rates = logged(Path(folder) / "run", "train/images_per_second")
            found[f"{way}, {size}"] = round(rates[-1] / size)
    return found
