"""However the workers share a batch, and whatever a loss does with the model, the gradient is the global batch's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.commands import evaluate
from disttrain.data import MemorySplit, StepSampler
from disttrain.distributed import later
from disttrain.distributed.collectives import gather_objects
from disttrain.distributed.world import join_world
from disttrain.parallel.choose import parallelize
from disttrain.recipe import DataRecipe, ParallelRecipe
from disttrain.testing import run_workers
from tests.disttrain.data.loaders import train_loader
from tests.disttrain.parallel import exact_runs
from tests.disttrain.parallel.gradients import (
    assert_close,
    classify,
    gradients_by_hand,
    gradients_of_an_epoch,
    network,
    split,
    total,
)


@pytest.mark.distributed(world_size=[1, 2, 3, 4], process_group=False)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_the_mean_over_the_global_batch(accumulate: int) -> None:
    with join_world("cpu", threads=1, most_sharing_memory=9 * (accumulate > 1)) as world:
        strategy = parallelize(network(), world, ParallelRecipe())
        assert_close(gradients_of_an_epoch(strategy, world, accumulate), gradients_by_hand())


def test_more_workers_than_samples() -> None:
    """A worker without a sample takes part, and weighs nothing."""

    def gradient_of_one_sample() -> torch.Tensor:
        with join_world("cpu", threads=1) as world:
            data = split()
            one = MemorySplit(data.images[:1], data.labels[:1], data.classes, data.mean, data.std)
            strategy = parallelize(network(), world, ParallelRecipe())
            sampler = StepSampler(1, num_replicas=world.size, rank=world.rank, batch_size=4)
            (batch,) = train_loader(one, sampler, DataRecipe(batch_size=4), device=world.device).epoch(0)
            (part,) = batch.parts
            loss = strategy.loss(classify, (part.data[0].double(), part.data[1]), num_samples=1)
            (loss / batch.global_size * (not part.is_filler) * strategy.loss_scale).backward()  # type: ignore[no-untyped-call]
            strategy.finish_step(batch.global_size, 0)
            gradient = next(strategy.model.parameters()).grad
            assert gradient is not None
            return gradient

    alone, *others = (
        run_workers(gradient_of_one_sample, size, process_group=False, timeout_s=240)[0] for size in (1, 2, 3)
    )
    assert alone.abs().max() > 0
    for other in others:
        torch.testing.assert_close(other, alone, rtol=1e-12, atol=1e-14)


class Towers(nn.Module):
    """Several ways in, with state behind one of them; each loss leaves something unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4, momentum=1.0)
        self.text = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)
        self.double()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.image(images)  # type: ignore[no-any-return]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(images))  # type: ignore[no-any-return]


def by_methods(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Never calls the model itself: a method, twice, and submodules."""
    assert isinstance(model, Towers)
    image, mirrored = model.encode(batch["image"]), model.encode(-batch["image"])
    return (image * model.text(batch["text"]) + mirrored.tanh()).square().sum()


def by_calls(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Calls the model several times, and a method besides."""
    assert isinstance(model, Towers)
    consistency = model(batch["image"]) - model(batch["image"].roll(1, dims=1))
    return consistency.square().sum() + model.encode(batch["image"]).pow(4).sum()


LOSSES = {"methods": by_methods, "calls": by_calls}


@pytest.mark.distributed(world_size=[2, 3], process_group=False)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_may_call_any_method_of_the_model_any_number_of_times(name: str) -> None:
    """And what it leaves unused has no gradient, though the model's own forward may use it."""
    compute: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor] = LOSSES[name]
    alone, generator = Towers(), torch.Generator().manual_seed(0)
    with join_world("cpu", threads=1) as world:
        strategy = parallelize(Towers(), world, ParallelRecipe(find_unused_parameters=True))
        for step, accumulate in enumerate((1, 2, 1)):
            batch = {
                "image": torch.rand(12, 6, dtype=torch.float64, generator=generator),
                "text": torch.rand(12, 5, dtype=torch.float64, generator=generator),
            }
            alone.zero_grad()
            compute(alone, batch).backward()  # type: ignore[no-untyped-call]
            strategy.model.zero_grad()
            for part in range(accumulate):
                num_parts, mine = world.size * accumulate, world.rank * accumulate + part
                share = {key: value.tensor_split(num_parts)[mine] for key, value in batch.items()}
                loss = strategy.loss(compute, share, num_samples=len(share["text"]), is_last=part == accumulate - 1)
                (loss * strategy.loss_scale).backward()  # type: ignore[no-untyped-call]
            strategy.finish_step(12, step)
            for (key, expected), found in zip(alone.named_parameters(), strategy.model.parameters(), strict=True):
                if expected.grad is None:
                    assert found.grad is None, key
                else:
                    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-14, msg=key)
        assert copy.deepcopy(strategy.model).state_dict().keys() == alone.state_dict().keys()


@pytest.mark.distributed(world_size=2, process_group=False)
def test_every_step_starts_from_the_first_ranks_buffers_whichever_module_holds_them(rank: int) -> None:
    seen = []

    def normalised(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, Towers)
        assert model.norm.running_mean is not None
        seen.append(model.norm.running_mean.tolist())
        outputs = model.norm(model.encode(images)) + model.norm(model.encode(images + 1))
        return outputs.sum()  # type: ignore[no-any-return]

    with join_world("cpu", threads=1) as world:
        strategy = parallelize(Towers(), world, ParallelRecipe(find_unused_parameters=True))
        for step, is_last in enumerate((True, False, True)):  # two steps: the second has two micro-batches
            images = torch.full((3, 6), float(rank + step), dtype=torch.float64)
            strategy.loss(normalised, images, num_samples=3, is_last=is_last).backward()  # type: ignore[no-untyped-call]
        first, second = gather_objects(seen)
    assert first[0] == second[0] == [0.0] * 4
    assert first[1] == second[1] != first[0], "the buffers after the first step are rank 0's"
    assert first[2] != second[2], "within a step each worker keeps its own"


def test_a_run_evaluates_the_model_that_it_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With BatchNorm each worker has statistics of its own, and a checkpoint has rank 0's."""
    batchnorm = f"model.name={exact_runs.__name__}:build"

    run_workers(exact_runs.train, 2, args=(tmp_path, "parallel.exact=false", batchnorm), process_group=False)
    evaluate.command.main([str(tmp_path), "--json", "--trust"], standalone_mode=False)
    by_one_worker = json.loads(capsys.readouterr().out)
    of_the_run = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert by_one_worker == {key: of_the_run[key] for key in by_one_worker}


class Renorm(nn.BatchNorm1d):
    """Stands for what reads its running statistics in training, too."""


@pytest.mark.parametrize(("norm", "is_sent_at_each_step"), [(nn.BatchNorm1d, False), (Renorm, True)])
def test_on_gpus_only_what_no_training_step_reads_stays_where_it_is(
    norm: type[nn.Module], is_sent_at_each_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    with join_world("cpu", threads=1) as world:
        strategy: Any = parallelize(nn.Sequential(nn.Linear(2, 3), norm(3)), world, ParallelRecipe(strategy="ddp"))
        assert strategy.module.broadcast_buffers is is_sent_at_each_step


@pytest.mark.distributed(world_size=2, process_group=False)
def test_accumulation_talks_once_per_step() -> None:
    """Gradients travel with the last micro-batch only: what is summed in memory is counted."""
    with join_world("cpu", threads=1, most_sharing_memory=9) as world:
        strategy = parallelize(network(), world, ParallelRecipe())
        assert world.sums is not None
        for number in range(4):
            assert world.sums.num_begun == 0
            images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
            strategy.loss(total, images, num_samples=2, is_last=number == 3).backward()
        assert world.sums.num_begun == 1
        strategy.finish_step(2, 0)


@pytest.mark.distributed(world_size=2, process_group=False)
@pytest.mark.parametrize("compress", ["none", "bf16"])
def test_sparse_gradients_meet_beside_those_in_memory(rank: int, compress: Literal["none", "bf16"]) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1, bias=False)

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, Rows)
        return model.linear(model.table(rows)).sum()

    with join_world("cpu", threads=1, most_sharing_memory=9) as world:
        assert world.sums is not None
        recipe, through_gloo = ParallelRecipe(compress=compress), replace(world, sums=None)
        both = [parallelize(Rows(), there, recipe) for there in (world, through_gloo)]
        both[1].model.load_state_dict(both[0].model.state_dict())
        for _ in range(2):  # the reducer arranges its sums anew after the first
            for strategy in both:
                strategy.model.zero_grad()
                strategy.loss(loss, torch.tensor([rank, 3]), num_samples=2).backward()
                strategy.finish_step(4, 0)
            for mine, other in zip(*(strategy.model.parameters() for strategy in both), strict=True):
                assert mine.grad is not None
                assert other.grad is not None
                assert torch.equal(mine.grad.to_dense(), other.grad.to_dense())
                assert mine.grad.to_dense().any()


def test_a_run_has_the_same_bits_whether_gradients_meet_in_memory_or_through_gloo(tmp_path: Path) -> None:
    """Of two workers; a run may be resumed without."""

    def run(where: str, *overrides: str) -> dict[str, torch.Tensor]:
        options = ("parallel.exact=false", f"model.name={exact_runs.__name__}:build", *overrides)
        run_workers(exact_runs.train, 2, args=(tmp_path / where, *options), process_group=False)
        return read_checkpoint(CheckpointStore(tmp_path / where / "checkpoints").paths()[-1]).model

    through_gloo = run("gloo", "parallel.shared_memory=false")
    run("both", "train.max_steps=7")
    both = run("both", "parallel.shared_memory=false")
    assert through_gloo.keys() == both.keys()
    assert all(torch.equal(through_gloo[name], both[name]) for name in both)
