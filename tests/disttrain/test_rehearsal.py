"""What is done before the first step, so that a process's first step is like any other and no fault waits for later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe

QUIET = (
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "train.threads=1",
    "data.batch_size=12",
    "data.crop_padding=0",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "train.eval_batch_size=3",
    "optim.lr=0.02",
)


def samples(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(num) % 3


def train(run_dir: Path, model: nn.Module, *overrides: str, num: int = 36) -> str:
    """Train on `num` samples in batches of 12; the hash of the weights and buffers at the end."""
    recipe = load_recipe("digits", [*QUIET, *overrides])
    disttrain.train(recipe, run_dir=run_dir, model=model, train_set=samples(num), test_set=samples(6))
    return weights_sha256(read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1]).model)


def refusal(run_dir: Path, model: nn.Module, *overrides: str, num: int = 36) -> str:
    """Why the training is refused, before its first step."""
    with pytest.raises(ConfigurationError) as caught:
        train(run_dir, model, *overrides, num=num)
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "journal.jsonl").exists()
    return str(caught.value)


class Net(nn.Module):
    """Two megabytes of weights, which DistributedDataParallel sums in several buckets, and odd parts on demand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.norm(self.body(images)))
        return scores


@pytest.mark.distributed(world_size=3, process_group=False)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_first_step_after_a_restart_has_the_bits_of_any_other(tmp_path: Path, accumulate: int) -> None:
    """Three summands: their sum depends on how DistributedDataParallel has put gradients into buckets."""
    options = (f"train.accumulate={accumulate}",)
    whole = train(tmp_path / "whole", Net(700), *options, "train.max_steps=3")
    train(tmp_path / "parts", Net(700), *options, "train.max_steps=2")
    assert train(tmp_path / "parts", Net(700), *options, "train.max_steps=3") == whole
