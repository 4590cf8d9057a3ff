"""A compiled model: which kernels compute a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from disttrain.distributed import later
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, FailuresNamedAt
from disttrain.recipe import load_recipe
from disttrain.training import compiled, loop
from disttrain.training.audit import Corruption
from disttrain.training.compiled import compile_model, compiled_for_each_shape
from disttrain.training.evaluate import evaluate
from disttrain.training.given import Given
from disttrain.training.job import build_job
from disttrain.training.loop import train_step
from disttrain.training.preflight.exactness import try_exactness
from disttrain.training.preflight.model import check_model
from disttrain.training.preflight.warmup import warm_up
from tests.disttrain.parallel.exact_runs import SMALL

CPU = torch.device("cpu")


def is_for_any_size(inputs: Sequence[Any]) -> bool:
    """Whether a graph that is compiled for these inputs is not for their sizes alone."""
    return any(isinstance(size, torch.SymInt) for one in inputs for size in (one, *getattr(one, "shape", ())))


class Doubling(nn.Module):
    """Of a class of its own: torch 2.11 compiles no other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(numbers)


@pytest.mark.parametrize(("any_shape", "after_a_last_batch"), [("false", "fixed"), ("true", "any size")])
def test_kernels_follow_from_the_shape_and_not_from_the_batches_before(
    any_shape: str, after_a_last_batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default: after the first batch of another size all are computed by kernels for any size."""
    ran: list[str] = []

    def backend(graph: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        kind = "any size" if is_for_any_size(inputs) else "fixed"

        def run(*arguments: Any) -> Any:
            ran.append(kind)
            return graph(*arguments)

        return run

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    torch.compiler.reset()  # type: ignore[no-untyped-call]
    model = Doubling()
    compile_model(model, load_recipe("digits", [f"train.compile_any_shape={any_shape}"]).train, CPU)
    for size in (8, 8, 5, 8, 5):
        model(torch.ones(size, 4))
    assert ran == ["fixed", "fixed", *[after_a_last_batch] * 3]


@pytest.mark.parametrize(("any_shape", "is_the_same"), [("false", True), ("true", False)])
def test_an_evaluation_does_not_depend_on_the_batches_before(
    any_shape: str, is_the_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an epoch, whose last batch is smaller, or in a process that has computed nothing: 31 samples, by 8.

    Kernels for any size compute other numbers here.
    """

    def backend(graph: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        factor = 1.01 if is_for_any_size(inputs) else 1.0
        return lambda *arguments: [factor * one for one in graph(*arguments)]

    def evaluated(weights: dict[str, Any], num_steps: int) -> tuple[dict[str, Any], dict[str, float]]:
        torch.compiler.reset()  # type: ignore[no-untyped-call]
        with join_world("cpu", threads=1) as world:
            job = build_job(recipe, world, Given(model=WithStatistics()))
            job.model.load_state_dict(weights)
            for batch in islice(job.loader.epoch(0), num_steps):
                train_step(job, batch)
                job.step += 1
            evaluation = evaluate(job.model, job.task, job.eval_loader)
            job.close()
        return job.model.state_dict(), evaluation.metrics

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    monkeypatch.setenv("CXX", sys.executable)
    overrides = ("parallel.exact=false", "train.compile=true", f"train.compile_any_shape={any_shape}")
    recipe = load_recipe("digits", [*SMALL, *overrides])
    weights, after_an_epoch = evaluated(WithStatistics().state_dict(), 5)
    _, fresh = evaluated(weights, 0)
    assert (fresh == after_an_epoch) is is_the_same


def test_kernels_are_made_before_the_first_step_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70 samples in batches of 16: whole ones, and a last one of 6, by two micro-batches each."""
    made: list[str] = []

    def backend(graph: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        made.append("a graph")
        return graph

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model, **options: compile_(model, backend=backend, dynamic=False))
    monkeypatch.setenv("CXX", sys.executable)
    torch.compiler.reset()  # type: ignore[no-untyped-call]
    recipe = load_recipe(
        "digits", [*SMALL, "parallel.exact=false", "train.compile=true", "train.accumulate=2", "data.flip=true"]
    )
    with join_world("cpu", threads=1) as world:
        job = build_job(recipe, world, Given(model=WithStatistics()))
        check_model(job, pytest.fail)
        assert made == [], "what is tried before training has sizes that training has not"
        before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
        with monkeypatch.context() as machine:
            machine.setattr(job.task, "loss", without_memory_for_whole_batches(job.task.loss))
            assert warm_up(job) is not None, "the first step says what lacks memory, and what to do"
        words = warm_up(job)
        assert words is not None
        assert words.startswith("compiled for batches of 8 and 3 in ")
        num = len(made)
        assert num >= 2
        assert all(torch.equal(tensor, before[name]) for name, tensor in job.model.state_dict().items())
        for batch in job.loader.epoch(0):
            train_step(job, batch)
            job.step += 1
        assert len(made) == num
        job.close()


class InOnePlace(torch.autograd.Function):
    """Numbers as they are, and a gradient in memory that the next one will be in, as a CUDA graph gives it."""

    place: torch.Tensor | None = None

    @staticmethod
    def forward(ctx: Any, numbers: torch.Tensor) -> torch.Tensor:
        """See torch."""
        return numbers.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """See torch."""
        if InOnePlace.place is None:
            InOnePlace.place = torch.empty_like(gradient)
        return InOnePlace.place.copy_(gradient).detach()


class Replayed(nn.Module):
    """A linear layer whose scores and gradients are always in the same memory, as those of CUDA graphs are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3072) / 50)
        self.scores: dict[int, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = images.flatten(1) @ InOnePlace.apply(self.weight).T  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            return scores  # type: ignore[no-any-return]
        return self.scores.setdefault(len(images), torch.empty_like(scores)).copy_(scores)


def trained(*overrides: str) -> tuple[torch.Tensor, dict[str, float]]:
    """The weights after a step of it, and its evaluation; nothing is compiled."""
    common = ("parallel.exact=false", "train.eval_views=mirror", "train.compile=true")
    InOnePlace.place = None
    with join_world("cpu", threads=1) as world:
        job = build_job(load_recipe("digits", [*SMALL, *common, *overrides]), world, Given(model=Replayed()))
        train_step(job, next(iter(job.loader.epoch(0))))
        evaluation = evaluate(job.model, job.task, job.eval_loader)
        job.close()
    return job.model.get_parameter("weight").detach().clone(), evaluation.metrics


def compile_nothing(patch: pytest.MonkeyPatch) -> None:
    """Have models that are compiled be as they are, with no compiler needed."""

    def as_it_is(model: Any, **options: Any) -> None:
        model._compiled_call_impl = model._call_impl

    patch.setattr(nn.Module, "compile", as_it_is)
    patch.setenv("CXX", sys.executable)


def test_what_cuda_graphs_write_over_is_copied_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU passes for a GPU: gradients that others are added to, and the scores of an image's two views."""

    compile_nothing(monkeypatch)
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    whole, of_whole = trained("train.compile_mode=max-autotune")
    parts, of_parts = trained("train.compile_mode=max-autotune", "train.accumulate=4")
    assert torch.allclose(whole, parts, atol=1e-6)
    assert of_whole["loss"] == pytest.approx(of_parts["loss"], abs=1e-4)
    monkeypatch.setattr(_pytree, "tree_map_only", lambda kind, function, tree: tree)
    assert abs(trained("train.compile_mode=max-autotune")[1]["loss"] - of_whole["loss"]) > 1e-3, (
        "the test shows nothing"
    )
    wrong, _ = trained("train.compile_mode=default", "train.accumulate=4")
    assert not torch.allclose(whole, wrong, atol=1e-6), "the test shows nothing"


@pytest.mark.parametrize("also", ["train.accumulate=2", "parallel.audit_every_steps=1"])
def test_in_exact_mode_each_slices_gradients_outlive_the_graphs_of_the_next(
    also: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits of a model that is not compiled, since nothing is, in truth; and so does a slice that is audited."""

    exact = ("parallel.exact=true", "parallel.slices=4", also)
    compile_nothing(monkeypatch)
    with monkeypatch.context() as without_graphs:
        without_graphs.setattr(InOnePlace, "apply", torch.Tensor.clone)
        plain, _ = trained(*exact)
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    graphs, _ = trained(*exact, "train.compile_mode=reduce-overhead")
    assert torch.equal(plain, graphs)
    monkeypatch.setattr(loop, "own_gradients", lambda model: None)
    try:
        overwritten, _ = trained(*exact, "train.compile_mode=reduce-overhead")
    except Corruption:
        return  # the audit has seen what was written over
    assert not torch.equal(plain, overwritten), "the test shows nothing"


class Counting(Replayed):
    """One whose gradient is another one each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = super().forward(images)
        if scores.requires_grad:
            scores.register_hook(lambda gradient, times=self.calls: gradient * times)  # type: ignore[misc]
        return scores


def test_what_is_not_exact_is_found_though_graphs_write_to_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    recipe = load_recipe("digits", [*SMALL, "train.compile=true", "train.compile_mode=reduce-overhead"])
    for model, message in ((Replayed(), None), (Counting(), "the model gives another result for 'weight'")):
        InOnePlace.place = None
        with join_world("cpu", threads=1) as world:
            job = build_job(recipe, world, Given(model=model))
            monkeypatch.setattr(job.task, "loss", lambda model, batch: model(batch[0]).sum(), raising=False)
            with pytest.raises(ConfigurationError, match=message) if message else nullcontext():
                try_exactness(job)
            job.close()


def test_in_exact_mode_a_model_stays_compiled_for_more_shapes_than_torch_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def backend(graph: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        made.append(1)
        return graph

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model, **options: compile_(model, backend=backend, dynamic=False))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(compiled, "_MOST_KERNELS", 12)
    torch.compiler.reset()  # type: ignore[no-untyped-call]
    model = Doubling()
    compile_model(model, load_recipe("digits").train, CPU)

    def compute(sizes: Sequence[int], *overrides: str) -> None:
        with compiled_for_each_shape(load_recipe("digits", ["train.compile=true", *overrides])):
            for size in sizes:
                model(torch.ones(size, 4))

    compute(range(2, 14), "parallel.exact=true")
    with pytest.raises(ConfigurationError, match="the model was compiled 12 times and would be again"):
        compute([14], "parallel.exact=true")
    assert len(made) == 12
    compute([14])  # torch's own way

    @torch.compile(backend=backend)
    def doubled(numbers: torch.Tensor) -> torch.Tensor:
        return 2 * numbers

    def compute_its_own() -> None:
        exact = load_recipe("digits", ["train.compile=true", "parallel.exact=true"])
        with compiled_for_each_shape(exact), FailuresNamedAt("Task.loss", " at step 3"):
            for size in range(2, 15):
                doubled(torch.ones(size))

    with pytest.raises(ConfigurationError, match=r"compiles itself \(.*test_compiled.py:\d+\) was compiled 12 times"):
        compute_its_own()


def test_what_a_task_compiles_itself_is_refused_where_kernels_would_depend_on_the_shapes_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the model was looked at before, by the same samples; what torch compiles without kernels is not."""

    def doubled(numbers: torch.Tensor) -> torch.Tensor:
        return 2 * numbers

    def tried(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with join_world("cpu", threads=1) as world:
            job = build_job(load_recipe("digits", [*SMALL, "parallel.exact=true"]), world, Given(model=Replayed()))
            monkeypatch.setattr(job.task, "loss", lambda model, batch: function(model(batch[0])).sum(), raising=False)
            check_model(job, print)
            try_exactness(job)
            job.close()

    tried(lambda scores: torch.cond(scores.sum() > 0, torch.sin, torch.cos, (scores,)))
    for is_whole in (False, True):
        with pytest.raises(ConfigurationError, match=r"set train\.compile = true"):
            tried(torch.compile(doubled, backend="aot_eager", fullgraph=is_whole))


def test_all_slices_sizes_are_known_to_each_worker() -> None:
    """Of 70 samples in batches of 16 by three workers: slices of 6 and 5, and of the last batch 2."""
    recipe = load_recipe("digits", [*SMALL, "parallel.slices=3"])
    with join_world("cpu", threads=1) as world:
        job = build_job(recipe, world, Given(model=Replayed()))
        job.loader.deal(1, 3, [1])
        assert (job.loader.sizes(), job.loader.sizes(of_all_slices=True)) == ([5, 2], [6, 5, 2])
        job.close()


def without_memory_for_whole_batches(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def limited(model: nn.Module, batch: Any) -> torch.Tensor:
        if len(batch[0]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return loss(model, batch)

    return limited


class WithStatistics(nn.Module):
    """A class of its own, with a buffer that each batch changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3072), nn.Linear(3072, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.last(self.norm(images.flatten(1)))
        return scores


@pytest.mark.parametrize(
    ("device", "compiler", "there_is_none"),
    [
        ("cpu", None, r"a C\+\+ compiler, and there is no (g|clang)\+\+ here: .* name one in CXX"),
        ("cpu", "/opt/c++ -O2", r"a C\+\+ compiler, and there is no /opt/c\+\+ here"),
        ("cuda", None, "a C compiler, and there is no gcc or clang here: .* name one in CC"),
    ],
)
def test_no_compiler_is_named_before_training(
    device: str, compiler: str | None, there_is_none: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
        if compiler is not None:
            monkeypatch.setenv(name, compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"^train.compile = true needs {there_is_none}"):
        compile_model(nn.Linear(1, 1), load_recipe("digits").train, torch.device(device))
