"""Fragments of a model that meet at steps of their own: how it is cut, and that a run may be interrupted anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import disttrain
from disttrain.distributed.collectives import gather_objects
from disttrain.distributed.world import World, join_world
from disttrain.errors import ConfigurationError
from disttrain.models.gpt import GPT
from disttrain.parallel.choose import parallelize
from disttrain.parallel.fragments import Fragments
from disttrain.recipe import ParallelRecipe, load_recipe
from disttrain.testing import faults, run_workers, workers
from disttrain.training.hooks import HookContext
from tests.disttrain.parallel import exact_runs
from tests.disttrain.parallel.gradients import ALONE, network

HERE, FAST = __name__, "parallel.exact=false"
EVERY = 4  # of the ten steps of the small job, whose fragments are due after steps 2, 6, 10 and 4, 8


def sizes_of(model: nn.Module) -> dict[str, int]:
    return {name: one.numel() for name, one in model.named_parameters()}


def members(cut: Fragments, model: nn.Module, num_fragments: int) -> list[set[str]]:
    """The names of each fragment's parameters."""
    return [{name for name in sizes_of(model) if cut.of(name) == number} for number in range(num_fragments)]


@pytest.mark.parametrize("num_fragments", [1, 2, 4])
def test_of_equal_blocks_each_fragment_has_every_so_many_th_and_as_much_as_the_others(num_fragments: int) -> None:
    model = GPT(vocab_size=64, context_length=8, num_layers=8, num_heads=2, dim=32)  # whose weights are tied
    cut = Fragments(sizes_of(model), num_fragments, every=20)
    found = members(cut, model, num_fragments)
    assert set.union(*found) == sizes_of(model).keys()
    assert sum(map(len, found)) == len(sizes_of(model)), "a parameter is in one fragment"
    assert cut.largest_share < 1.05 / num_fragments
    for names in found:
        of_kind = [name for name in names if name.endswith("mlp.out.weight")]
        assert len(of_kind) == 8 // num_fragments


def test_a_parameter_larger_than_all_others_is_a_fragment_by_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(1000, 8), nn.Linear(4, 4), nn.LayerNorm(4))
    cut = Fragments(sizes_of(model), 3, every=9)
    first, third, norm = ({f"{number}.weight", f"{number}.bias"} for number in (0, 2, 3))
    assert members(cut, model, 3) == [{"1.weight"}, first | norm, third]
    assert cut.largest_share == pytest.approx(8000 / 8048)


@pytest.mark.parametrize(("every", "num_fragments"), [(10, 1), (10, 3), (7, 7), (50, 4)])
def test_every_fragment_is_due_once_in_so_many_steps_and_the_last_one_at_multiples(
    every: int, num_fragments: int
) -> None:
    cut = Fragments({f"{number}.weight": 1 for number in range(num_fragments)}, num_fragments, every)
    for start in (0, every):
        due = [cut.due_after(step) for step in range(start, start + every)]
        assert [one for one in due if one is not None] == list(range(num_fragments))
        assert due[-1] == num_fragments - 1
        assert [cut.num_never_due(number) for number in (0, every - 1, every)] == [num_fragments, 1, 0]
        gaps = [step for step, one in enumerate(due) if one is not None]
        assert max(b - a for a, b in zip(gaps, [*gaps[1:], gaps[0] + every], strict=True)) <= -(-every // num_fragments)


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone, as a run without a launcher joins it."""
    with join_world("cpu", threads=1) as world:
        yield world


@pytest.mark.parametrize(
    ("fragments", "layers_after", "words"),
    [
        (1, {3: (1, 3)}, ""),
        (2, {1: (1,), 3: (3,)}, ", in 2 fragments, one at a time (the largest 83% of the model)"),
    ],
)
def test_outer_steps_are_those_of_sgd_with_nesterov_momentum(
    world: World, fragments: int, layers_after: dict[int, tuple[int, ...]], words: str
) -> None:
    recipe = ParallelRecipe(sync_every=4, sync_fragments=fragments, outer_learning_rate=0.7, outer_momentum=0.9)
    local = parallelize(network(), world, recipe)
    assert local.reason == f"1 worker makes an outer step every 4 steps{words}"
    outer = network()
    turns = {
        step: [one for layer in layers for one in outer.get_submodule(str(layer)).parameters()]
        for step, layers in layers_after.items()
    }
    by_hand = {step: torch.optim.SGD(of, lr=0.7, momentum=0.9, nesterov=True) for step, of in turns.items()}
    inner = torch.optim.SGD(local.model.parameters(), lr=0.1)
    images = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(12):
        local.follow_unfreezing()
        local.loss(lambda model, batch: model(batch).square().sum(), images, num_samples=6).backward()  # type: ignore[no-untyped-call]
        local.finish_step(6, step)
        inner.step()
        inner.zero_grad()
        assert local.meets_after(step) is (step % 4 in turns)
        if local.meets_after(step):
            pairs = list(zip(outer.parameters(), local.model.parameters(), strict=True))
            before = [trained.detach().clone() for _, trained in pairs]
            for start, trained in pairs:
                start.grad = start.detach() - trained.detach()
            by_hand[step % 4].step()
            local.meet_(step)
            for (start, trained), was in zip(pairs, before, strict=True):
                is_due = any(start is one for one in turns[step % 4])
                torch.testing.assert_close(trained, start if is_due else was, rtol=1e-12, atol=1e-14)


class Watch(disttrain.Hook):
    """Fails unless after each step those tensors are the same everywhere that have just met, and only those."""

    def after_step(self, context: HookContext) -> None:
        """As `Hook` has it."""
        state = context.model.state_dict()
        by_rank = gather_objects({name: tensor.tolist() for name, tensor in state.items()})
        same = {name for name in state if all(one[name] == by_rank[0][name] for one in by_rank)}
        same -= {"1.num_batches_tracked"}  # every worker counts alike
        head, rest = {"6.weight", "6.bias"}, {name for name in state if name[0] in "01"} - {"1.num_batches_tracked"}
        assert same == {2: head, 0: rest}.get(context.step % EVERY, set()), f"after step {context.step}"


OPTIONS = (
    FAST,
    f"parallel.sync_every={EVERY}",
    "parallel.sync_fragments=2",
    f"model.name={exact_runs.__name__}:build",
    f"train.hooks=['{HERE}:Watch']",
    "train.clip_norm=0.5",
    "optim.name=adamw",
    "optim.lr=0.01",
)


def killed(folder: Path) -> None:
    """The 32 bits' run, saved after step 5."""
    exact_runs.train(folder / "32" / "killed", *OPTIONS, "checkpoint.every_steps=5")


def in_parts(folder: Path) -> None:
    """Whole runs and runs in parts: stopped between two fragments' turns, right after one, and between the others."""
    for bits, stops, *more in (("32", (3, 6, 7)), ("8", (3, 6), "parallel.compress=int8")):
        exact_runs.train(folder / bits / "whole", *OPTIONS, *more)
        for stop in stops:
            exact_runs.train(folder / bits / "in parts", *OPTIONS, *more, f"train.max_steps={stop}")
        exact_runs.train(folder / bits / "in parts", *OPTIONS, *more)
    exact_runs.train(folder / "at once", *OPTIONS, "parallel.sync_fragments=1", "train.hooks=[]")
    killed(folder)  # to its end


def test_a_run_resumes_between_fragments_to_the_same_bits(tmp_path: Path) -> None:
    with workers(2, process_group=False, timeout_s=300, faults=[faults.kill(1, step=6)]) as group:
        assert "died" in [one.state for one in group.attempt(killed, tmp_path)]
    run_workers(in_parts, 2, args=(tmp_path,), process_group=False, timeout_s=300)

    whole = exact_runs.outcome(tmp_path / "32" / "whole")
    for one in (exact_runs.outcome(tmp_path / "32" / where) for where in ("in parts", "killed")):
        assert (one.weights, one.optimizer, one.state) == (whole.weights, whole.optimizer, whole.state)
        assert one.evaluation == whole.evaluation
    in_int8, in_int8_parts = (exact_runs.outcome(tmp_path / "8" / where) for where in ("whole", "in parts"))
    assert (in_int8.weights, in_int8.optimizer) == (in_int8_parts.weights, in_int8_parts.optimizer)
    others = (in_int8.weights, exact_runs.outcome(tmp_path / "at once").weights)
    assert len({whole.weights, *others}) == 3


def test_another_number_of_workers_resumes_from_the_model_of_the_run(tmp_path: Path) -> None:
    plain = tuple(one for one in OPTIONS if "hooks" not in one)
    for num_workers, num_steps in ((2, 5), (3, 7), (1, 10)):
        overrides = (*plain, f"train.max_steps={num_steps}")
        run_workers(exact_runs.train, num_workers, args=(tmp_path, *overrides), process_group=False, timeout_s=300)
    assert exact_runs.outcome(tmp_path).state["step"] == 10


def test_what_cannot_be_cut_so_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"sync_fragments = 8 .*, and sync_every = 4 has fewer"):
        load_recipe("digits", ["parallel.sync_every=4", "parallel.sync_fragments=8"])
    with pytest.raises(ConfigurationError, match=r"sync_fragments = 3, and the model has 2 layers with weights"):
        parallelize(network(), ALONE, ParallelRecipe(sync_every=4, sync_fragments=3))
