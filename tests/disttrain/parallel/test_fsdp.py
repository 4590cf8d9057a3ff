"""A model in shards trains as a whole one does, and its checkpoints are read by any strategy and number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from disttrain.errors import ConfigurationError, DivergedError
from disttrain.models.gpt import GPT
from disttrain.models.resnet import resnet18
from disttrain.parallel.fsdp import blocks_of
from disttrain.recipe import load_recipe
from disttrain.testing import run_workers

# 3 samples in the last batch: shares are uneven, and with three workers and micro-batches some are empty.
SMALL = (
    "data.batch_size=7",
    "data.options={context_length=8}",
    "model.options={num_layers=2, num_heads=2, dim=12}",
    "optim.name=adamw",
    "optim.lr=0.001",
    "optim.decay_biases_and_norms=false",
    "train.epochs=1",
    "train.max_steps=6",
    "train.clip_norm=0.5",
    "train.accumulate=2",
    "train.ema_decay=0.9",
    "train.log_every_steps=1",
    "train.eval_batch_size=3",
    "tracking.uri=none",
    "tracking.system_metrics=false",
)
FSDP, MLPS = "parallel.strategy=fsdp", "parallel.shard_modules=['MLP']"


def train(folder: Path, name: str, *overrides: str) -> None:
    recipe = load_recipe("text-gpt", [*SMALL, f"data.root={folder / 'texts'}", *overrides])
    disttrain.train(recipe, run_dir=folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(1, 21):
        text = "The cat sat on the mat. It was a small, black cat, and an old mat."[: number * 3]
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    return tmp_path


def newest(run_dir: Path) -> Checkpoint:
    return read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])


def assert_alike(one: Checkpoint, other: Checkpoint) -> None:
    for mine, theirs in ((one.model, other.model), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-4, atol=2e-5, msg=name)
    assert one.state["metrics"].keys() == other.state["metrics"].keys()
    for name, value in one.state["metrics"].items():
        assert other.state["metrics"][name] == pytest.approx(value, rel=1e-3)


def test_shards_train_as_one_process_does_and_any_strategy_resumes_them(folder: Path) -> None:
    """With clipping, accumulation, averages of the weights and parameter groups; resumed in both directions."""
    train(folder, "alone")
    run_workers(train, 3, args=(folder, "mixed", "train.max_steps=3", FSDP), process_group=False)
    assert (CheckpointStore(folder / "mixed" / "checkpoints").paths()[-1] / "model.rank-00002.safetensors").exists()
    run_workers(train, 2, args=(folder, "mixed", "train.max_steps=4", "parallel.strategy=ddp"), process_group=False)
    run_workers(train, 2, args=(folder, "mixed", "train.max_steps=5", FSDP, MLPS), process_group=False)
    train(folder, "mixed", FSDP)  # one worker, with nothing to shard
    alone = newest(folder / "alone")
    assert alone.state["step"] == 6
    assert_alike(newest(folder / "mixed"), alone)


REFUSED = {
    "parallel.find_unused_parameters=true": "find_unused_parameters is for parallel.strategy = 'ddp'",
    "parallel.compress=bf16": "compress is for parallel.strategy = 'ddp'",
    "optim.name=Adafactor": "cannot be combined with optim.name = 'Adafactor'",
    "train.precision=fp16": "cannot be combined with train.precision = 'fp16'",
    "train.compile=true": "cannot be combined with train.compile",
    "parallel.shard_modules=['Blok']": "shard_modules: the model has no module of class 'Blok'",
}


def test_what_shards_cannot_do_is_refused_by_name(folder: Path) -> None:
    def refused() -> dict[str, str]:
        said = {}
        for override in REFUSED:
            with pytest.raises(ConfigurationError) as caught:
                train(folder, "run", FSDP, override)
            said[override] = str(caught.value)
        return said

    for said in run_workers(refused, 2, process_group=False):
        for override, message in REFUSED.items():
            assert message in said[override]


class Root(nn.Module):
    """A model whose square root has no gradient at zero."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, vocab_size)

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head((x - x).sqrt())
        return logits


def test_a_gradient_that_is_not_finite_ends_the_run_on_all_workers_with_its_cause(folder: Path) -> None:
    def diverges() -> str:
        recipe = load_recipe("text-gpt", [*SMALL, f"data.root={folder / 'texts'}", FSDP])
        with pytest.raises(DivergedError) as caught:
            disttrain.train(recipe, run_dir=folder / "run", model=Root)
        return str(caught.value)

    one, other = run_workers(diverges, 2, process_group=False)
    assert one == other
    assert "the gradient of" in one
    assert "is not finite at step 1" in one
    assert newest(folder / "run").state["step"] == 0


def test_blocks_are_those_of_transformers_and_resnets() -> None:
    gpt = GPT(vocab_size=11, num_layers=3, num_heads=2, dim=8)
    assert list(blocks_of(gpt)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(blocks_of(gpt, ["MLP"])) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    names = list(blocks_of(resnet18(num_classes=3, sample_shape=(3, 32, 32))))
    assert names == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    shared = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))
    shared.get_submodule("2.0").weight = shared.get_submodule("0.0").weight
    assert list(blocks_of(shared)) == ["1"], "a weight that two blocks share belongs to none of them"
