"""A model in shards trains as a whole one does, and its checkpoints are read by any strategy and number of workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import disttrain
from disttrain.checkpoint import Checkpoint, CheckpointStore, read_checkpoint, weights_sha256
from disttrain.checkpoint.weights import read_weights
from disttrain.commands import evaluate, predict, runs
from disttrain.distributed.collectives import num_issued
from disttrain.distributed.sharded import whole
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, DivergedError
from disttrain.layout import MODEL, shard_names
from disttrain.models.buffers import same_bits
from disttrain.models.gpt import GPT
from disttrain.models.resnet import resnet18
from disttrain.models.spill import LargeTensorsInFiles
from disttrain.parallel.fsdp import Fsdp
from disttrain.parallel.modules import blocks_of
from disttrain.recipe import ParallelRecipe, load_recipe
from disttrain.testing import run_workers
from disttrain.training.given import Given
from disttrain.training.job import build_job
from disttrain.training.sharding import constructing

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
FSDP, MLPS, TWO = "parallel.strategy=fsdp", "parallel.shard_modules=['MLP']", "parallel.shard_size=2"


def train(folder: Path, name: str, *overrides: str) -> None:
    recipe = load_recipe("text-gpt", [*SMALL, f"data.root={folder / 'texts'}", *overrides])
    disttrain.train(recipe, run_dir=folder / name)


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


def assert_read_by_commands(sharded: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint in parts is exported, in one file and in several with their index, evaluated and predicts."""
    found = read_checkpoint(sharded)
    averages = {name: found.optimizer.get(f"ema.{name}", one) for name, one in found.model.items()}
    for to, *options in (("one",), ("several", "--max-size", "4KB")):
        CliRunner().invoke(runs.command, ["export", str(sharded), str(folder / to), *options], catch_exceptions=False)
        assert weights_sha256(read_weights(folder / to)) == weights_sha256(averages)
    assert len(list((folder / "several").glob("model-*.safetensors"))) > 2
    capsys.readouterr()
    evaluate.command.main([str(sharded), "--json"], standalone_mode=False)
    evaluated = json.loads(capsys.readouterr().out)["metrics"]
    assert evaluated["loss"] == pytest.approx(found.state["metrics"]["eval/loss"], rel=1e-5)
    predict.command.main([str(sharded), "The cat"], standalone_mode=False)
    assert "The cat" in capsys.readouterr().out


def test_shards_train_as_one_process_does_and_any_strategy_resumes_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With clipping, accumulation, averages of the weights and parameter groups; resumed in both directions."""
    train(folder, "alone")
    run_workers(train, 3, args=(folder, "mixed", "train.max_steps=3", FSDP), process_group=False)
    assert (CheckpointStore(folder / "mixed" / "checkpoints").paths()[-1] / "model.rank-00002.safetensors").exists()
    run_workers(train, 2, args=(folder, "mixed", "train.max_steps=4", "parallel.strategy=ddp"), process_group=False)
    run_workers(train, 4, args=(folder, "mixed", "train.max_steps=5", FSDP, MLPS, TWO), process_group=False)
    written = CheckpointStore(folder / "mixed" / "checkpoints").paths()[-1]
    files = [load_file(written / name) for name in shard_names(MODEL, 4)]
    assert all(files), "the ranks of both copies write"
    assert sum(one.numel() for file in files for one in file.values()) == 4032, "each number once"
    assert_read_by_commands(written, folder / "exported", capsys)
    train(folder, "mixed", FSDP)  # one worker, with nothing to shard
    alone = newest(folder / "alone")
    assert alone.state["step"] == 6
    assert_alike(newest(folder / "mixed"), alone)


def test_a_model_that_is_made_in_files_starts_as_the_whole_one_does(folder: Path) -> None:
    def unlike() -> tuple[int, list[str]]:
        large = (*SMALL, f"data.root={folder / 'texts'}", "model.options={num_layers=2, num_heads=2, dim=256}")
        with join_world("cpu", threads=1) as world:
            whole_job = build_job(load_recipe("text-gpt", list(large)), world, Given())
            with mock.patch("disttrain.training.sharding.available_memory", return_value=0):
                in_files = constructing(load_recipe("text-gpt", [*large, FSDP]), world, folder)
                with mock.patch("disttrain.training.job.constructing", return_value=in_files):
                    job = build_job(load_recipe("text-gpt", [*large, FSDP]), world, Given(), folder)
            pairs = zip(job.model.named_parameters(), whole_job.model.parameters(), strict=True)
            differ = [name for (name, one), other in pairs if not same_bits(whole(one.detach()), other.detach())]
            return cast("LargeTensorsInFiles", in_files).num_files, differ

    for num_files, differ in run_workers(unlike, 2, process_group=False):
        assert num_files >= 4, "the two layers of each MLP"
        assert differ == []


REFUSED = {
    "parallel.find_unused_parameters=true": "find_unused_parameters is for parallel.strategy = 'ddp'",
    "parallel.compress=bf16": "compress is for parallel.strategy = 'ddp'",
    "optim.name=Adafactor": "cannot be combined with optim.name = 'Adafactor'",
    "optim.name=muon": "cannot be combined with optim.name = 'muon'",
    "train.precision=fp16": "cannot be combined with train.precision = 'fp16'",
    "train.compile=true": "cannot be combined with train.compile",
    "parallel.param_dtype=bf16": "without train.precision = 'bf16': set both",
    "parallel.reduce_dtype=bf16 parallel.exact=true": "in exact mode, which has the bits of DDP",
    "parallel.shard_size=3": "2 were started: start a multiple of 3",
    "parallel.shard_modules=['Blok']": "shard_modules: the model has no module of class 'Blok'",
}


def test_what_shards_cannot_do_is_refused_by_name(folder: Path) -> None:
    def refused() -> dict[str, str]:
        said = {}
        for override in REFUSED:
            with pytest.raises(ConfigurationError) as caught:
                train(folder, "run", FSDP, *override.split())
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


class Counting(nn.Linear):
    """Notes in both passes how many collectives were begun before."""

    def __init__(self, begun: list[int]) -> None:
        super().__init__(4, 4)
        self.begun = begun

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.requires_grad:
            self.note()
            y.register_hook(self.note)
        return y

    def note(self, *_: Any) -> None:
        self.begun.append(num_issued(torch.device("cpu")))


def test_blocks_are_gathered_ahead_of_their_use() -> None:
    """In both passes, as far as asked for, or once for both; after an evaluation none is left that was not called."""

    def gathered(depth: int, is_freed_between: bool) -> tuple[list[int], list[bool]]:
        begun: list[int] = []
        model = nn.Sequential(*(nn.Sequential(Counting(begun)) for _ in range(4)))
        with join_world("cpu", threads=1) as world:
            keys: dict[str, Any] = {"prefetch": depth, "reshard_after_forward": is_freed_between}
            strategy = Fsdp(model, world, ParallelRecipe(strategy="fsdp", **keys))
            strategy.loss(lambda model, batch: model(batch).sum(), torch.ones(2, 4), num_samples=2).backward()  # type: ignore[no-untyped-call]
            strategy.score(lambda model, batch: model[0](batch), torch.ones(2, 4))
            states = [cast("Any", block)._get_fsdp_state()._fsdp_param_group for block in model]
            held = [one.is_unsharded or one._all_gather_result is not None for one in states]
            return [count - begun[0] for count in begun], held

    for depth, is_freed, expected in ((0, True, [0, 1, 2, 3]), (2, True, [0, 1, 1, 1]), (0, False, [0, 1, 2, 3])):
        for counts, held in run_workers(gathered, 2, args=(depth, is_freed), process_group=False):
            assert counts[:4] == expected, counts
            assert (counts[-1] == 6) == (not is_freed), f"kept, four gathers and the first sums: {counts}"
            assert held == [False] * 4


def test_blocks_are_those_of_transformers_and_resnets() -> None:
    gpt = GPT(vocab_size=11, num_layers=3, num_heads=2, dim=8)
    assert list(blocks_of(gpt)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(blocks_of(gpt, ["MLP"])) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    names = list(blocks_of(resnet18(num_classes=3, sample_shape=(3, 32, 32))))
    assert names == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    shared = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))
    shared.get_submodule("2.0").weight = shared.get_submodule("0.0").weight
    assert list(blocks_of(shared)) == ["1"], "a weight that two blocks share belongs to none of them"
