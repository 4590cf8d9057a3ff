"""A block's activations computed again in the backward pass: the same bits, and less is held until then."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.errors import ConfigurationError
from disttrain.parallel.alone import Alone
from disttrain.parallel.data_parallel import DataParallel
from disttrain.recipe import load_recipe
from disttrain.testing import run_workers
from disttrain.training.recompute import checkpoint_activations
from tests.disttrain.parallel.test_fsdp_models import samples

SMALL = (
    "data.batch_size=16",
    "optim.name=adamw",
    "optim.lr=0.01",
    "train.clip_norm=0.5",
    "train.accumulate=2",
    "train.precision=bf16",
    "train.epochs=1",
    "train.max_steps=2",
    "train.eval_batch_size=5",
    "tracking.uri=none",
    "tracking.system_metrics=false",
)
RECOMPUTED = "train.checkpoint_activations=true"


class Block(nn.Module):
    """BatchNorm, dropout, and numbers of Python's and NumPy's; a buffer that the result depends on."""

    decay: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.register_buffer("decay", torch.ones(()))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.norm(self.linear(x)).tanh()) * self.decay.clone()
        if self.training:
            self.decay.mul_(0.9)
            y = y * (1 + random.random() + float(np.random.rand()))
        return x + y * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=x.sigmoid())
        y: torch.Tensor = self.last(x)
        return y


def step(*, recomputed: bool, dtype: torch.dtype | None) -> tuple[dict[str, torch.Tensor], int, nn.Module]:
    """Gradients, buffers and the next random numbers after a step; how many numbers were held for the backward pass."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model, held = Net(), 0
    checkpoint_activations(Alone(model, ""), is_wanted=recomputed)

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += tensor.numel()
        return tensor

    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), autocast:
        loss = model(torch.randn(50, 6)).float().square().sum()
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return found | {"next": torch.tensor([torch.rand(1), random.random(), np.random.rand()])}, held, model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_has_the_same_bits_and_holds_less(dtype: torch.dtype | None) -> None:
    (plain, held_by_plain, model), (found, held, again) = (step(recomputed=on, dtype=dtype) for on in (False, True))
    assert found.keys() == plain.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, plain[name])] == []
    assert held < 0.5 * held_by_plain
    assert list(again.state_dict()) == list(model.state_dict())
    copied, x = copy.deepcopy(again), torch.randn(4, 6)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert copied.eval()(x).abs().sum() > 0, "a copy computes with its own weights"
    checkpoint_activations(Alone(again, ""), is_wanted=False)
    assert not any("forward" in vars(module) for module in again.modules()), "it can be trained without"


class Writing(Block):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x, scale=scale.mul_(2))


def test_what_cannot_be_computed_again_is_refused_by_name() -> None:
    model = nn.ModuleList([Writing()])
    checkpoint_activations(Alone(model, ""), is_wanted=True)
    with pytest.raises(ConfigurationError, match="'0' writes to what it is given"):
        model[0](torch.ones(2, 6), scale=torch.ones(2, 6))
    with pytest.raises(ConfigurationError, match="the model has no blocks"):
        checkpoint_activations(Alone(nn.Linear(2, 2), ""), is_wanted=True)
    with pytest.raises(ConfigurationError, match="cannot be combined with DataParallel"):
        checkpoint_activations(DataParallel(model, ""), is_wanted=True)
    with pytest.raises(ConfigurationError, match="checkpoint_activations and compile are both true"):
        load_recipe("digits", [RECOMPUTED, "train.compile=true"])


class Signs(disttrain.Task):
    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def bits(run_dir: Path, *overrides: str) -> tuple[str, str, Any]:
    """Train; weights, optimizer and metrics."""
    torch.manual_seed(0)
    sets = {"train_set": samples(48, 1), "test_set": samples(10, 2)}
    disttrain.train(load_recipe("digits", [*SMALL, *overrides]), run_dir=run_dir, model=Net, task=Signs, **sets)
    found = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])
    return weights_sha256(found.model), weights_sha256(found.optimizer), found.state["metrics"]


EXACT, FSDP, KEPT = "parallel.exact=true", "parallel.strategy=fsdp", "parallel.reshard_after_forward=false"


def assert_same_bits(folder: Path, alike: list[list[str]], exact: list[list[str]]) -> None:
    """Of the first and the others with two workers, and in exact mode with one without recomputation."""

    def trained() -> list[Any]:
        return [bits(folder / str(number), *overrides) for number, overrides in enumerate([*alike, *exact])]

    alone = bits(folder / "alone", EXACT)
    for found in run_workers(trained, 2, process_group=False):
        assert found[: len(alike)] == [found[0]] * len(alike)
        assert found[len(alike) :] == [alone] * len(exact)


def test_shards_have_the_same_bits(tmp_path: Path) -> None:
    """With clipping, accumulation and bfloat16; in exact mode those of one worker that keeps its activations."""
    assert_same_bits(tmp_path, [[FSDP], [FSDP, RECOMPUTED]], [[FSDP, EXACT, RECOMPUTED, KEPT]])


@pytest.mark.long
def test_every_strategy_has_the_same_bits(tmp_path: Path) -> None:
    assert_same_bits(tmp_path / "ddp", [[], [RECOMPUTED]], [[EXACT, RECOMPUTED], [FSDP, EXACT, RECOMPUTED]])
    assert_same_bits(tmp_path / "fsdp", [[FSDP], [FSDP, KEPT], [FSDP, RECOMPUTED, KEPT]], [[FSDP, EXACT, KEPT]])
