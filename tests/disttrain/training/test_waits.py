"""How often a step asks the device for a number: on a GPU each time waits for all that it was given before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain.distributed import exact_sum, fixed_point, later, runs
from disttrain.distributed.world import join_world
from disttrain.recipe import load_recipe
from disttrain.training.evaluate import scored
from disttrain.training.given import Given
from disttrain.training.job import Job, build_job
from disttrain.training.loop import train_step
from disttrain.training.preflight import model
from tests.disttrain.parallel.exact_runs import SMALL, build

LOOKING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
NUM_STEPS = 3
READ_LATER = 1  # of the next step's bounds: on a GPU it travels beside what is computed


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.name in LOOKING:
            self.seen[operator._schema.name] += 1
        return operator(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """A list is made of a tensor on the CPU without an operator."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("tolist", "cpu", "numpy"):
            self.seen[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def prepare_as_on_a_gpu(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exact mode compute as it does where looks are dear."""
    job.strategy._sums._may_look = False  # type: ignore[attr-defined]
    monkeypatch.setattr(fixed_point, "_numpy_reaches", lambda device: False)
    monkeypatch.setattr(
        fixed_point,
        "_largest_in_each",
        lambda tensors: torch.where((found := fixed_point._largest_by_norms(tensors)).isfinite(), found, float("inf")),
    )


def steps(*overrides: str, prepare: Callable[[Job], None] = lambda job: None) -> tuple[Job, list[Counter[str]]]:
    """A job after its first steps, and how often each of them looked."""
    seen = []
    with join_world("cpu", threads=1) as world:
        torch.manual_seed(0)
        job = build_job(load_recipe("digits", [*SMALL, *overrides]), world, Given(model=build(3, (3, 32, 32))))
        prepare(job)
        for _, batch in zip(range(NUM_STEPS), job.loader.epoch(0), strict=False):
            looks: Counter[str] = Counter()
            with Operators(looks), Lists(looks):
                train_step(job, batch)
            job.step += 1
            seen.append(looks)
        job.close()
    return job, seen


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "train.clip_norm=0.5",
            "train.accumulate=2",
            "train.ema_decay=0.9",
            "train.precision=bf16",
        ),
        ("data.crop_padding=2", "data.flip=true", "data.cutout=4", "train.non_finite=skip", "optim.momentum=0.9"),
        ("data.crop_padding=2", "data.crop_fill=reflect", "data.flip=alternate", "optim.name=muon", "optim.other=sgd"),
    ],
)
def test_a_step_of_fast_mode_looks_once(overrides: tuple[str, ...]) -> None:
    _, seen = steps("parallel.exact=false", "train.log_every_steps=100", *overrides)
    assert [sum(looks.values()) for looks in seen] == [1] * NUM_STEPS, seen


@pytest.mark.parametrize(
    "optimizer",
    [
        ("optim.momentum=0.9",),
        ("optim.name=adamw", "optim.lr=0.01"),
        ("optim.name=muon", "optim.hold_norms=true", "optim.other=sgd"),
        ("optim.momentum=0.9", "train.precision=fp16"),
    ],
)
def test_a_step_on_a_gpu_looks_at_nothing_but_what_the_step_before_has_sent(
    optimizer: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU passes for a GPU: the first step looks at nothing, each other at one tensor of the step before it."""
    jobs: list[Job] = []
    ages: list[int] = []

    def to_host_later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        begun = jobs[0].step

        def read() -> torch.Tensor:
            ages.append(jobs[0].step - begun)
            return tensor

        return read

    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(later, "to_host_later", to_host_later)
    _, seen = steps(
        "parallel.exact=false", "data.crop_padding=2", "data.flip=true", "data.cutout=4", "train.clip_norm=0.5",
        "train.accumulate=2", "train.ema_decay=0.9", "train.precision=bf16", "train.log_every_steps=1", *optimizer,
        prepare=jobs.append,
    )  # fmt: skip
    assert [sum(looks.values()) for looks in seen] == [0, *[READ_LATER] * (NUM_STEPS - 1)], seen
    assert ages == [1] * (NUM_STEPS - 1)


def evaluated() -> tuple[Any, list[int]]:
    """What a set scores, and how many looks there were by the end of each batch."""
    looks: Counter[str] = Counter()
    counted: list[int] = []
    with join_world("cpu", threads=1) as world:
        torch.manual_seed(0)
        options = ("task.options.class_weights=[1.0, 2.0, 3.0]", "task.options.top_k=2")
        job = build_job(load_recipe("digits", [*SMALL, *options]), world, Given(model=build(3, (3, 32, 32))))
        with Operators(looks), Lists(looks):
            sums = scored(job.model, job.task, job.eval_loader, on_batch=lambda: counted.append(looks.total()))
        job.close()
    return {name: value.tolist() for name, value in sums.by_name.items()}, counted


def test_an_evaluation_on_a_gpu_looks_at_nothing_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes to the same, confusion matrix included."""
    at_once, _ = evaluated()
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    assert evaluated() == (at_once, [0] * 4)


def test_exact_mode_steps_whole_weights_by_the_kernels_that_parts_of_them_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP's parts cannot be fused, and the bits are to be the same."""
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    exact, _ = steps("train.log_every_steps=100")
    fast, _ = steps("train.log_every_steps=100", "parallel.exact=false")
    assert [job.optimizer.param_groups[0]["fused"] for job in (exact, fast)] == [None, True]


def test_what_a_task_makes_of_a_score_is_tried_on_the_host_as_in_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    def to_host_later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        sent.append(tensor.clone())
        return lambda host=sent[-1]: host  # type: ignore[misc]

    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(later, "to_host_later", to_host_later)
    with join_world("cpu", threads=1) as world:
        job = build_job(load_recipe("digits", SMALL), world, Given(model=build(3, (3, 32, 32))))
        tried: list[dict[str, Any]] = []
        monkeypatch.setattr(model, "check_evaluation", lambda task, score, *rest: tried.append(score))
        model._evaluate(job)
        job.close()
    assert sent
    assert [id(one) for one in tried[0].values()] == [id(one) for one in sent]


def test_a_step_of_exact_mode_looks_once_however_many_slices_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_slices in (2, 8):
        _, seen = steps(
            f"parallel.slices={num_slices}", "train.log_every_steps=100",
            prepare=lambda job: prepare_as_on_a_gpu(job, monkeypatch),
        )  # fmt: skip
        assert [sum(looks.values()) for looks in seen[1:]] == [1 + READ_LATER] * (NUM_STEPS - 1), seen


def test_a_gpu_has_all_integers_to_make_before_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has nothing to do while the host looks is idle; a CPU keeps no more of them than a run."""
    seen: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(runs, "_MOST_NUMBERS", {"cpu": 4})
    monkeypatch.setattr(exact_sum.FixedPointSum, "integers", noted("made", exact_sum.FixedPointSum.integers))
    monkeypatch.setattr(exact_sum, "holds", noted("looked", exact_sum.holds))
    orders, sums = [], []
    for is_gpu in (False, True):
        monkeypatch.setattr(later, "is_asynchronous", lambda device, is_gpu=is_gpu: is_gpu)
        with join_world("cpu", threads=1):
            sums.append(torch.zeros(10))
            seen.clear()
            exact_sum.exact_sum_([sums[-1]], [[torch.arange(10.0)], [torch.ones(10)]], 2, expected=[16.0])
        orders.append(list(seen))
    assert orders == [["made", "looked", "made", "made"], ["made", "made", "made", "looked"]]
    assert sums[0].tolist() == sums[1].tolist() == (torch.arange(10.0) + 1).tolist()


def test_what_is_computed_without_looking_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = steps("train.log_every_steps=100")
    other, _ = steps("train.log_every_steps=100", prepare=lambda job: prepare_as_on_a_gpu(job, monkeypatch))
    assert one.strategy.state() == other.strategy.state()
    theirs = other.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.model.state_dict().items())
