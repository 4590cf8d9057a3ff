"""Exact mode in shards: the bits of one worker, whatever the number of workers and the strategy."""

from __future__ import annotations

import ctypes
import itertools
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.distributed import runs
from disttrain.distributed.collectives import num_issued
from disttrain.distributed.sharded import is_sharded
from disttrain.distributed.world import World, join_world
from disttrain.errors import ConfigurationError, UserCodeError
from disttrain.parallel import gathered
from disttrain.parallel.exact import dealing, sharded
from disttrain.parallel.exact.norm import norm_of_whole
from disttrain.parallel.exact.sharded import ShardedSlices
from disttrain.parallel.mesh import mesh_of
from disttrain.recipe import Recipe, load_recipe
from disttrain.testing import run_workers
from disttrain.training.given import Given
from disttrain.training.job import build_job
from disttrain.training.loop import train_step
from disttrain.training.preflight.exactness import try_exactness
from tests.disttrain.parallel.exact_runs import outcome
from tests.disttrain.parallel.odd_blocks import Returning, Sparse
from tests.disttrain.parallel.test_fsdp_models import Odd, Signs, kinds_of_incidents, samples

EXACT, FSDP = ("parallel.exact=true",), ("parallel.exact=true", "parallel.strategy=fsdp")
_PR_SET_THP_DISABLE = 41  # see prctl(2)
TWO_BY_TWO = (*FSDP, "parallel.shard_size=2")
# 3 samples in the last batch: a slice is empty, and with three workers all their slices come in uneven numbers.
GPT = (
    "data.batch_size=7",
    "data.options={context_length=8}",
    "model.options={num_layers=2, num_heads=2, dim=12}",
    "optim.name=adamw",
    "optim.lr=0.01",
    "optim.decay_biases_and_norms=false",
    "train.epochs=1",
    "train.max_steps=6",
    "train.clip_norm=0.5",
    "train.accumulate=2",
    "train.precision=bf16",
    "train.ema_decay=0.9",
    "train.log_every_steps=1",
    "train.eval_batch_size=3",
    "tracking.uri=none",
    "tracking.system_metrics=false",
)


ODD = (
    "data.batch_size=11",
    "optim.name=sgd",
    "optim.lr=0.1",
    "train.epochs=2",
    "train.eval_batch_size=3",
    "train.log_every_steps=1",
    "tracking.uri=none",
    "tracking.system_metrics=false",
)


def train_gpt(folder: Path, name: str, *overrides: str) -> None:
    recipe = load_recipe("text-gpt", [*GPT, f"data.root={folder / 'texts'}", *overrides])
    disttrain.train(recipe, run_dir=folder / name)


def on(size: int, train: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    run_workers(partial(train, **options), size, args=arguments, process_group=False)


def as_of_a_large_model(train: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Neither weights nor gradients stay whole for longer than a block needs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "_LEAST_BYTES", 0)
        patch.setattr(gathered, "_SHARE_OF_FREE", 0.0)
        patch.setattr(sharded, "_MOST_HELD_BYTES", 0)
        patch.setattr(runs, "_MOST_NUMBERS", {"cpu": 50})  # of one tensor, and of several
        patch.setattr(dealing, "_MOST_RUNS", 6)
        return train(*arguments, **options)


large_gpt = partial(as_of_a_large_model, train_gpt)


def test_a_gpt_has_the_bits_of_one_worker_also_when_it_was_stopped_and_resumed_otherwise(folder: Path) -> None:
    """With AdamW, clipping, accumulation, averages of the weights and bfloat16."""
    train_gpt(folder, "alone", *FSDP)
    on(3, large_gpt, folder, "mixed", "train.max_steps=2", *FSDP)
    on(2, train_gpt, folder, "mixed", "train.max_steps=3", *EXACT)
    on(4, large_gpt, folder, "mixed", "train.max_steps=4", "parallel.shard_modules=['MLP']", *TWO_BY_TWO)
    on(2, train_gpt, folder, "mixed", "train.max_steps=5", *FSDP)
    train_gpt(folder, "mixed", *FSDP)
    assert bits(folder / "mixed") == bits(folder / "alone")
    assert step_of(folder / "alone") == 6


class OddBySlice(Odd):
    """Besides, a parameter that only some slices use: those whose first sample is positive in sum."""

    def __init__(self) -> None:
        super().__init__()
        self.some = nn.Parameter(torch.ones(7, 1))

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        scores = super().scores(inputs)
        return scores * self.some.sum() if inputs[0].sum() > 0 else scores


def train_odd(run_dir: Path, *overrides: str, model: type[nn.Module] = OddBySlice, seed: int = 1) -> None:
    recipe = load_recipe("digits", [*ODD, *overrides])
    sets = {"train_set": samples(20, seed), "test_set": samples(10, 2)}
    torch.manual_seed(0)
    disttrain.train(recipe, run_dir=run_dir, model=model, task=Signs, **sets)


@pytest.mark.parametrize(
    ("policy", "size", "strategy", "train"),
    [
        ("skip", 3, FSDP, partial(as_of_a_large_model, train_odd)),
        ("zero", 4, TWO_BY_TWO, partial(as_of_a_large_model, train_odd)),
        ("zero", 3, FSDP, train_odd),
    ],
)
def test_an_odd_model_has_the_bits_of_one_worker(
    tmp_path: Path, policy: str, size: int, strategy: tuple[str, ...], train: Callable[..., None]
) -> None:
    """Tied, frozen and unused parameters, one that only some slices use, BatchNorm, a step that is not finite."""
    overrides = ("model.freeze=blocks.0.0.*", f"train.non_finite={policy}")
    train_odd(tmp_path / "alone", *FSDP, *overrides)
    on(size, train, tmp_path / "several", *strategy, *overrides)
    assert repr(outcome(tmp_path / "several")) == repr(outcome(tmp_path / "alone"))  # a loss that is NaN is among it
    assert kinds_of_incidents(tmp_path / "several") == {"loss", "gradient"}


FINITE = 9  # the seed of samples that are all small


class Zeroed(nn.Module):
    """A parameter whose gradient is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)
        self.zeroed = nn.Parameter(torch.ones(7, 1))

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(inputs).tanh()) + self.zeroed.sum() * 0.0  # type: ignore[no-any-return]


def test_a_gradient_that_is_always_zero_has_no_step_computed_twice(tmp_path: Path) -> None:
    def second_passes() -> list[bool]:
        asked, answers = ShardedSlices.needs_second_pass, list[bool]()

        def noted(slices: ShardedSlices) -> bool:
            answers.append(asked(slices))
            return answers[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardedSlices, "needs_second_pass", noted)
            as_of_a_large_model(train_odd, tmp_path / "several", *FSDP, model=Zeroed, seed=FINITE)
        return answers

    by_rank = run_workers(second_passes, 2, process_group=False)
    assert by_rank == [[True, False, False, False]] * 2  # the first step's grids are not known
    train_odd(tmp_path / "alone", *FSDP, model=Zeroed, seed=FINITE)
    assert repr(outcome(tmp_path / "several")) == repr(outcome(tmp_path / "alone"))


def test_the_norm_of_parts_has_the_bits_of_the_whole_also_of_fewer_gradients_than_workers() -> None:
    def norms() -> list[tuple[float, float]]:
        found = []
        with join_world("cpu", threads=1) as world:
            mesh = mesh_of(world, 2)
            placements = [Replicate(), Shard(0)]
            for num in (1, 5):
                wholes = [torch.randn(7, 33, generator=torch.Generator().manual_seed(one)) for one in range(num)]
                cut = [distribute_tensor(one, mesh.devices, placements, src_data_rank=None) for one in wholes]
                found.append((norm_of_whole(cut, mesh).item(), nn.utils.get_total_norm(wholes).item()))
        return found

    for by_rank in run_workers(norms, 4, process_group=False):
        assert all(of_parts == of_whole for of_parts, of_whole in by_rank)


class InPlace(Signs):
    """A task that writes to its batch, which so is another one when a slice is computed again."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        batch[0].mul_(3.0)
        return super().loss(model, batch)


class Past(Odd):
    """What goes into a block, which uses it twice, is used outside of it, too."""

    class Block(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x.tanh())

    def __init__(self) -> None:
        super().__init__()
        self.past = Past.Block(5, 5)

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.first(inputs)
        return self.last(x + self.past(x))  # type: ignore[no-any-return]


def test_blocks_that_return_objects_or_are_computed_again_have_the_bits_of_one_worker(tmp_path: Path) -> None:
    train_odd(tmp_path / "alone", *FSDP, "train.epochs=1", model=Returning, seed=FINITE)
    large = partial(as_of_a_large_model, train_odd)
    on(2, large, tmp_path / "several", *FSDP, "train.epochs=1", model=Returning, seed=FINITE)
    assert repr(outcome(tmp_path / "several")) == repr(outcome(tmp_path / "alone"))


def test_what_shards_cannot_do_exactly_is_refused_by_name(tmp_path: Path) -> None:
    def refused() -> list[str]:
        said = []
        for model, task, override in (
            (Odd, Signs, "optim.fused=true"),
            (Odd, Signs, "optim.name=Adafactor"),
            (Odd, InPlace, "optim.lr=0.1"),
            (Past, Signs, "parallel.shard_modules=['Block']"),
            (Sparse, Signs, "parallel.shard_modules=['Block']"),
        ):
            recipe = load_recipe("digits", [*ODD, *FSDP, "train.non_finite=skip", override])
            sets = {"train_set": samples(20, 1), "test_set": samples(10, 2)}
            with pytest.raises(ConfigurationError) as caught:
                disttrain.train(recipe, run_dir=tmp_path / str(len(said)), model=model, task=task, **sets)
            said.append(str(caught.value))
        return said

    large = partial(as_of_a_large_model, refused)
    for fused, whole, twice, past, sparse in run_workers(large, 2, process_group=False):
        assert "cannot be combined with optim.fused = true in exact mode" in fused
        assert "cannot be combined with optim.name = 'Adafactor'" in whole
        assert "was computed twice" in twice
        assert "the gradient of 'first.weight' is added up in another order" in past
        assert "the gradient of 'table.weight' is sparse" in sparse


def bits(run_dir: Path) -> Any:
    found = outcome(run_dir)
    state = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1]).state
    # Evaluations are at the end of each start, and are none of an undisturbed run's.
    metrics = {key: value for key, value in found.metrics.items() if not key[1].startswith("eval/")}
    return found.weights, found.optimizer, found.evaluation, metrics, state["expected_magnitudes"]


def step_of(run_dir: Path) -> int:
    return int(outcome(run_dir).state["step"])


@pytest.mark.long
@pytest.mark.parametrize("what", ["gpt", "odd"])
def test_one_hash_whatever_the_number_of_workers_and_the_strategy(folder: Path, what: str) -> None:
    def train(name: str, *overrides: str) -> None:
        if what == "gpt":
            train_gpt(folder, name, *overrides)
        else:
            train_odd(folder / name, "train.non_finite=zero", "train.clip_norm=0.3", *overrides)

    on(1, train, "alone", *EXACT)
    large = partial(as_of_a_large_model, train)
    for size in (2, 3, 4):
        on(size, train, f"ddp-{size}", *EXACT)
        on(size, train, f"fsdp-{size}", *FSDP)
        on(size, large, f"large-{size}", *FSDP)
    on(4, train, "two-by-two-0", *TWO_BY_TWO)
    on(4, large, "two-by-two-1", *TWO_BY_TWO)
    alone = repr(outcome(folder / "alone"))
    named = (f"{strategy}-{size}" for size in (2, 3, 4) for strategy in ("ddp", "fsdp", "large"))
    for name in ("two-by-two-0", "two-by-two-1", *named):
        assert repr(outcome(folder / name)) == alone, name


def as_of_one_that_free_memory_affords(call: Callable[[], Any]) -> Any:
    """The gradients of its slices are too many to be kept anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "_MOST_HELD_BYTES", 0)
        return call()


def test_what_memory_affords_is_gathered_and_dealt_out_once_in_a_step_in_memory_that_is_kept(folder: Path) -> None:
    def num_faults() -> int:
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # pages of 2 MiB are few, whoever maps them
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def of_a_step() -> tuple[int, int]:
        words = [*GPT, f"data.root={folder / 'texts'}", "train.accumulate=1", *FSDP]
        with join_world("cpu", threads=1) as world:
            job = build_job(load_recipe("text-gpt", words), world, Given())
            first, second = itertools.islice(job.loader.epoch(0), 2)
            train_step(job, first)
            begun = num_issued(world.device)
            job.step += 1
            train_step(job, second)
            assert all(is_sharded(parameter) for parameter in job.model.parameters())
            num_begun = num_issued(world.device) - begun
            # Something small above a block that is freed may make its place too small for the next one.
            return num_begun, min(num_faults() for _ in range(8))

    (afforded, _), (large, _) = (
        run_workers(partial(variant, of_a_step), 2, process_group=False)
        for variant in (as_of_one_that_free_memory_affords, as_of_a_large_model)
    )
    # Two blocks and the rest: gathered once, against in each of two slices, and twice the blocks; dealt out once.
    assert large[0] - afforded[0] >= 9
    # 4 MiB are 1,024 pages, which the system maps once, or each time.
    assert afforded[1] < 500 < large[1]


def test_a_step_that_fails_leaves_the_model_in_parts_and_usable(folder: Path) -> None:
    """In exact mode nothing of it is left behind: made again, it has the loss and the norm that it would have had."""
    words = [*GPT, f"data.root={folder / 'texts'}", "train.accumulate=1"]

    def made_again(recipe: Recipe, world: World) -> list[tuple[float, float]]:
        job, undisturbed = build_job(recipe, world, Given()), build_job(recipe, world, Given())
        (batch,) = itertools.islice(job.loader.epoch(0), 1)
        computed, num_calls = job.task.loss, itertools.count()
        before = job.strategy.score(computed, batch.parts[0].data).item()
        num_good = len(batch.parts) - 1

        def fails(model: Any, data: Any) -> torch.Tensor:
            if next(num_calls) == num_good:
                raise ValueError("of the last part")
            return computed(model, data)

        job.task.loss = fails  # type: ignore[method-assign]
        with pytest.raises(UserCodeError, match="of the last part"):
            train_step(job, batch)
        assert all(is_sharded(parameter) for parameter in job.model.parameters())
        found = [(job.strategy.score(computed, batch.parts[0].data).item(), before)]
        if recipe.parallel.exact:
            (mine, norm), (theirs, undisturbed_norm) = (
                (step.losses.sum().item(), step.grad_norm.item())
                for step in (train_step(one, batch) for one in (job, undisturbed))
            )
            found += [(mine, theirs), (norm, undisturbed_norm)]
        return found

    def all_ways() -> list[tuple[float, float]]:
        with join_world("cpu", threads=1) as world:
            exact, fast = (load_recipe("text-gpt", [*words, *keys]) for keys in (FSDP, ["parallel.strategy=fsdp"]))
            large = as_of_a_large_model(made_again, exact, world)
            return [*large, *made_again(exact, world), *made_again(fast, world)]

    for pairs in run_workers(all_ways, 2, process_group=False):
        assert len(pairs) == 7
        assert all(found == expected for found, expected in pairs), pairs


def test_the_trial_gathers_one_block_at_a_time(folder: Path) -> None:
    def most_gathered() -> tuple[int, int]:
        words = [*GPT, f"data.root={folder / 'texts'}", "model.options={num_layers=3, num_heads=2, dim=12}", *FSDP]
        with join_world("cpu", threads=1) as world:
            job = build_job(load_recipe("text-gpt", words), world, Given())
            blocks: Any = job.model.get_submodule("blocks")
            gathered: list[int] = []

            def look(*_: Any) -> None:
                gathered.append(sum(not is_sharded(block.mlp.up.weight) for block in blocks))

            def look_twice(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                look()
                if output.requires_grad:
                    output.register_hook(look)

            for block in blocks:
                block.mlp.register_forward_hook(look_twice)
            try_exactness(job)
            return max(gathered), len(gathered)

    # Three trials, forward and backward, and an evaluation of three blocks.
    assert run_workers(most_gathered, 2, process_group=False) == [(1, 21), (1, 21)]
