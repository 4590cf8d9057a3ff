"""Optimizers by name, and schedules as functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.distributed import later
from disttrain.errors import ConfigurationError
from disttrain.recipe import OptimRecipe, ScheduleRecipe, parse_recipe
from disttrain.training.optim import Schedule, build_optimizer


def optim(**options: Any) -> OptimRecipe:
    return parse_recipe({"optim": options}).optim


def schedule(total: int = 100, per_epoch: int = 10, **options: Any) -> Schedule:
    return Schedule(ScheduleRecipe(**options), base_lr=1.0, steps_per_epoch=per_epoch, total_steps=total)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"name": "adam", "lr": 0.1, "betas": [0.8, 0.99]}, torch.optim.Adam),
        ({"name": "adamw", "lr": 0.1, "weight_decay": 0.05}, torch.optim.AdamW),
        ({"name": "RMSprop", "lr": 0.1, "alpha": 0.9}, torch.optim.RMSprop),
        ({"name": "adagrad", "lr": 0.1}, torch.optim.Adagrad),
    ],
)
def test_optimizers_by_name_with_their_options(options: dict[str, Any], kind: type) -> None:
    optimizer = build_optimizer(optim(**options), nn.Linear(2, 2).parameters())
    assert type(optimizer) is kind
    for name, value in options.items():
        if name != "name":
            assert optimizer.defaults[name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "RMSprop", "lr": 0.1, "alhpa": 0.9}, "optim.alhpa: RMSprop has no such option; did you mean 'alpha'"),
        ({"name": "RMSporp", "lr": 0.1}, "did you mean 'rmsprop'"),
        ({"name": "LBFGS", "lr": 0.1}, "optim.name = 'LBFGS'"),
        ({"name": "sgd", "lr": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
)
def test_what_an_optimizer_cannot_take_is_said_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_optimizer(optim(**options), nn.Linear(2, 2).parameters())


def test_a_fused_kernel_does_not_dampen_a_first_gradient_on_a_gpu_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    weight, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "fused": True}
    for parameter, optimizer in (
        (weight, build_optimizer(optim(name="sgd", **options), [weight])),
        (other, torch.optim.SGD([other], **options)),
    ):
        parameter.grad = torch.full((3,), 2.0)
        optimizer.step()
    assert torch.equal(weight, other)


def test_a_first_step_that_a_scaler_has_a_fused_kernel_leave_out_leaves_no_momentum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's own is then what the memory held."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, math.nan))
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(optim(name="sgd", lr=0.1, momentum=0.9, fused=True), [weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for gradient in (math.inf, 2.0):
        scaler.scale(torch.ones(()))
        weight.grad = torch.full((3,), gradient)
        scaler.step(optimizer)
        scaler.update(1.0)
    assert weight.tolist() == pytest.approx([0.8] * 3)


@pytest.mark.parametrize(
    ("options", "of_second"),
    [
        ({"name": "sgd", "momentum": 0.9, "dampening": 0.5}, {}),
        ({"name": "sgd", "momentum": 0.9}, {"fused": False}),
        ({"name": "adamw"}, {"fused": False}),
        ({"name": "muon", "other": "sgd"}, {"fused": False}),
    ],
)
def test_a_step_that_overflows_leaves_all_groups_alone_though_not_each_can_leave_it_out(
    options: dict[str, Any], of_second: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler then looks itself: next to fused kernels, others, and a first gradient that is not dampened."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, math.nan))
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    recipe = optim(lr=0.1, **options, **({} if options["name"] == "muon" else {"fused": True}))
    weights = {gradients: [nn.Parameter(torch.ones(3)) for _ in range(2)] for gradients in ((math.inf, 2.0), (2.0,))}
    for gradients, (one, other) in weights.items():
        groups = [{"params": [one]}, {"params": [other], **of_second}]
        optimizer = build_optimizer(recipe, groups, may_fuse=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for gradient in gradients:
            scaler.scale(torch.ones(()))
            one.grad, other.grad = torch.full((3,), 2.0), torch.full((3,), gradient)
            scaler.step(optimizer)
            scaler.update(1.0)
    overflowed, undisturbed = weights.values()
    assert [one.tolist() for one in overflowed] == [one.tolist() for one in undisturbed]


def test_warm_up_climbs_linearly_and_ends_at_the_base_rate() -> None:
    warm = schedule(warmup_steps=4)
    assert [warm.learning_rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule(warmup_epochs=0.5).warmup_steps == 5


def test_step_drops_by_gamma() -> None:
    steps = schedule(name="step", step_epochs=3, gamma=0.1)
    assert [round(steps.learning_rate(step), 6) for step in (0, 29, 30, 59, 60)] == [1.0, 1.0, 0.1, 0.1, 0.01]


def test_linear_climbs_and_falls_to_its_end() -> None:
    triangle = schedule(total=8, name="linear", warmup_steps=4, min_lr=0.2)
    rates = [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [triangle.learning_rate(step) for step in range(9)] == pytest.approx(rates)


def test_a_group_with_epochs_of_its_own_ends_its_schedule_there() -> None:
    whole = schedule(total=40, name="linear")
    assert [whole.of_group({"epochs": 1.5, "lr_scale": 2.0}, step) for step in (0, 5, 10, 14, 15, 39)] == pytest.approx(
        [2.0, 2 * 10 / 15, 2 * 5 / 15, 2 / 15, 0.0, 0.0]
    )
    assert whole.of_group({"lr_scale": 2.0}, 10) == 1.5
    assert [schedule().of_group({"epochs": 1.0}, step) for step in (9, 10)] == [1.0, 0.0]
    assert [schedule().of_group({"epochs": 0.01}, step) for step in (0, 1)] == [1.0, 0.0]  # one step, not none


def test_cosine_agrees_with_pytorchs() -> None:
    ours = schedule(name="cosine", min_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    for step in range(100):
        assert math.isclose(ours.learning_rate(step), theirs.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        theirs.step()
