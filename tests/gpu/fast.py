"""The pieces of `cifar10-fast` on a GPU: the numbers of a CPU where they are promised, and a run that learns."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.distributed.world import join_world
from disttrain.recipe import load_recipe
from disttrain.training.given import Given
from disttrain.training.init import start_from_images
from disttrain.training.job import build_job
from disttrain.training.muon import orthogonalised
from tests.gpu.registry import DEVICE, Answer, check, in_a_process, logged, small

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
FAST = (
    "data.dataset=synthetic", "tracking.uri=none", "tracking.system_metrics=false", f"train.device={DEVICE}",
    "train.log_every_steps=1",
)  # fmt: skip
HAS_GPU = DEVICE == "cuda"
# Of a GPU the recipe as it is, with fewer images; a CPU tries the check itself.
SIZE = (
    ("data.options={num_train=20000, num_test=2000, num_classes=10}",)
    if HAS_GPU
    else (
        "data.options={num_train=256, num_test=64, num_classes=4}", "data.batch_size=32", "train.eval_batch_size=64",
        "model.options={widths=[8, 16]}", "train.epochs=2", "train.precision=fp32", "train.eval_every_epochs=1",
        "optim.other_lr=1.0", "optim.lr=0.1",
    )
)  # fmt: skip


@check(60)
def orthogonalised_matrices_are_near_those_of_the_cpu() -> Answer:
    """In bfloat16 on a GPU: singular values near one, along the same directions."""
    found = {}
    for shape in ((64, 216), (256, 2304), (300, 40)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        here = orthogonalised(matrix.to(DEVICE), COEFFICIENTS, 5, 1e-7).float().cpu()
        along = left.T @ here @ right.T
        off = (along - along.diagonal().diag()).abs().max().item()
        least, most = along.diagonal().min().item(), along.diagonal().max().item()
        assert off < 0.05, (shape, off)
        assert 0.5 < least <= most < 1.5, (shape, least, most)
        found[str(shape)] = [round(least, 3), round(most, 3), round(off, 4)]
    return found


@check(90)
def alternate_flips_and_whitening_are_those_of_the_cpu() -> Answer:
    """Every bit of two epochs with mirrored edges, and of the filters."""
    epochs, filters = [], []
    overrides = (
        "data.crop_padding=2", "data.crop_fill=reflect", "data.flip=alternate", "model.name=airbench",
        "model.options={widths=[8, 16]}", "model.whiten=whiten",
    )  # fmt: skip
    for device in ("cpu", DEVICE):
        with join_world(device) as world:
            job = build_job(small(f"train.device={device}", *overrides), world, Given())
            parts = [part.data for epoch in (1, 2) for batch in job.loader.epoch(epoch, 0) for part in batch.parts]
            epochs.append([[tensor.cpu() for tensor in data] for data in parts])
            start_from_images(job)
            filters.append(job.model.get_parameter("whiten.weight").detach().cpu())
            job.close()
    for one, other in zip(*epochs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(*filters)
    return {"batches": len(epochs[0])}


@check(250)
def the_fast_recipe_learns() -> Answer:
    """`cifar10-fast` on made-up images: a loss that falls, the filters where they were put, and the seconds it took.

    Compiled, too, and as CUDA graphs, which write over scores and gradients that were not copied.
    """
    found = {}
    ways = {"as it is": ("train.compile=false",)}
    if HAS_GPU:
        ways["compiled"] = ("train.compile=true",)
        ways["graphs"] = ("train.compile=true", "train.compile_mode=reduce-overhead", "train.accumulate=2")
    for way, overrides in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe("cifar10-fast", [*FAST, *SIZE, *overrides])
            began = time.perf_counter()
            result = disttrain.train(recipe, run_dir=folder)
            losses = logged(Path(folder), "train/loss")
            assert sum(losses[-4:]) < sum(losses[:4]), losses
            first, *_, last = CheckpointStore(Path(folder) / "checkpoints").paths()
            kept = [read_checkpoint(path).model["whiten.weight"] for path in (first, last)]
            assert torch.equal(*kept)
            found[way] = {
                "seconds": round(time.perf_counter() - began, 1), "accuracy": round(result.accuracy, 3),
                "losses": [round(losses[0], 3), round(losses[-1], 3)],
            }  # fmt: skip
    return found


@check(200)
def muon_has_the_same_bits_in_exact_mode() -> Answer:
    """In two processes."""
    shas = []
    overrides = [
        *FAST, *SIZE, "data.batch_size=64", "parallel.exact=true", "train.max_steps=6", "train.precision=bf16",
    ]  # fmt: skip
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            code = (
                "import disttrain, pathlib\n"
                "from tests.gpu.registry import bits\n"
                f"disttrain.train(disttrain.load_recipe('cifar10-fast', {overrides!r}), run_dir={folder!r})\n"
                f"print(bits(pathlib.Path({folder!r})))"
            )
            shas.append(in_a_process(code))
    assert shas[0] == shas[1], shas
    return {"bits": shas[0]}
