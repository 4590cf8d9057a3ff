"""Optimizers by name with their own options checked, and schedules as functions of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from disttrain.distributed import later
from disttrain.errors import ConfigurationError
from disttrain.health.nonfinite_later import heeds_found_inf
from disttrain.parallel.strategy import Strategy
from disttrain.recipe import OptimRecipe, ScheduleRecipe
from disttrain.recipe.names import check_optimizer, nearest
from disttrain.training.momentum import begin_momentum
from disttrain.training.muon import Muon


def build_optimizer(
    recipe: OptimRecipe, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], *, may_fuse: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, with its options, for parameters or groups of them.

    On GPUs it takes a step in a kernel for many parameters, if it `may_fuse` and the recipe does not say otherwise.
    Raises ConfigurationError for an unknown name, an unknown option or a value that the optimizer refuses.
    """
    params: list[Any] = list(parameters)
    known: dict[str, Any] = {
        name: kind
        for name, kind in {**vars(torch.optim), "Muon": Muon}.items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    check_optimizer(recipe.name, known)
    kind = {name.lower(): kind for name, kind in known.items()}[recipe.name.lower()]
    allowed = [name for name in inspect.signature(kind).parameters if name not in ("params", "lr")]
    for option in recipe.options:
        if option not in allowed:
            near = nearest(option, allowed)
            hint = f"; did you mean '{near}'?" if near else "."
            raise ConfigurationError(
                f"optim.{option}: {kind.__name__} has no such option{hint} It has: {', '.join(allowed)}."
            )
    has_own_decay = any(isinstance(group, Mapping) and "weight_decay" in group for group in params)
    if has_own_decay and "weight_decay" not in allowed:
        raise ConfigurationError(
            f"optim: {kind.__name__} has no weight_decay, which a parameter group gives; leave it out there."
        )
    for key in (key for group in params if isinstance(group, Mapping) for key in group):
        if key not in (*allowed, "params", "lr_scale", "epochs", "name"):
            near = nearest(key, [*allowed, "lr_scale", "epochs"])
            hint = f"; did you mean '{near}'?" if near else "."
            raise ConfigurationError(f"the task's param_groups: {kind.__name__} has no option '{key}'{hint}")
    options = {name: _tuple(value) for name, value in recipe.options.items()}
    if may_fuse and _can_fuse(kind, recipe.options, params):
        options["fused"] = True
    # Before the optimizer writes what all groups share into each.
    own = [{key: group[key] for key in allowed if key in group} for group in params if isinstance(group, Mapping)]
    try:
        optimizer: torch.optim.Optimizer = kind(params, lr=recipe.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"optim: {kind.__name__} refuses these options: {error}") from error
    for of_group in own:
        try:  # torch looks at what all groups share, and not at what a group has of its own
            kind([nn.Parameter(torch.zeros(1))], lr=recipe.lr, **options | of_group)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"the task's param_groups: {kind.__name__} refuses {of_group}: {error}") from error
    if isinstance(optimizer, Muon) or getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch's name for it: a gradient scaler then gives `found_inf`, and does not look at it itself.
        vars(optimizer)["_step_supports_amp_scaling"] = heeds_found_inf(optimizer)
    if kind is torch.optim.SGD and any(group.get("fused") for group in optimizer.param_groups):
        is_wanted = later.is_asynchronous(_all(params)[0].device)
        # On CPUs where a gradient scaler may have a step left out.
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: begin_momentum(optimizer) if is_wanted or hasattr(optimizer, "found_inf") else None
        )
    return optimizer


def may_fuse(strategy: Strategy) -> bool:
    """Whether its gradients are dense, which those of an embedding may not be: fused kernels take no others.

    And not in exact mode: whole weights are to have the bits of FSDP's parts, which cannot be fused.
    """
    is_sparse = any(getattr(module, "sparse", False) is True for module in strategy.model.modules())
    return strategy.bits_depend_on_world_size and not is_sparse


def _can_fuse(kind: type, options: Mapping[str, Any], params: list[Any]) -> bool:
    """Whether torch has a fused kernel, also in 2.11, for all of it."""
    taken = {"fused", "foreach", "differentiable"} & options.keys()
    if taken or kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, Muon):
        return False
    dampened = [options.get("dampening", 0), *(group.get("dampening", 0) for group in params if type(group) is dict)]
    return not any(dampened) and all(
        type(one) is nn.Parameter and one.is_floating_point() and later.is_asynchronous(one.device)
        for one in _all(params)
    )


def _all(params: list[Any]) -> list[nn.Parameter]:
    return [one for group in params for one in (group["params"] if isinstance(group, Mapping) else [group])]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step, counted from 0: a function of the step, so nothing needs saving."""

    recipe: ScheduleRecipe
    base_lr: float
    steps_per_epoch: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate for `step`: linear warm-up from base/warm-up steps, then constant, steps, cosine or linear."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.base_lr * (step + 1) / warmup
        if self.recipe.name == "step":
            drops = step // (self.recipe.step_epochs * self.steps_per_epoch)
            return max(self.recipe.min_lr, self.base_lr * self.recipe.gamma**drops)
        if self.recipe.name == "cosine":
            progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            return self.recipe.min_lr + (self.base_lr - self.recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.recipe.name == "linear":
            progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            return self.base_lr + (self.recipe.min_lr - self.base_lr) * progress
        return self.base_lr

    def of_group(self, group: Mapping[str, Any], step: int) -> float:
        """The rate of a parameter group for `step`: scaled, and zero after its `epochs`, where its schedule ends."""
        if (epochs := group.get("epochs")) is None:
            return self.learning_rate(step) * float(group.get("lr_scale", 1.0))
        last = min(self.total_steps, max(1, round(epochs * self.steps_per_epoch)))
        rate = replace(self, total_steps=last).learning_rate(step) if step < last else 0.0
        return rate * float(group.get("lr_scale", 1.0))

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.recipe.warmup_steps or round(self.recipe.warmup_epochs * self.steps_per_epoch)


def set_learning_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Give every parameter group its learning rate for `step`."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.of_group(group, step)


def learning_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> dict[str, float]:
    """The rate for `step`, and that of each parameter group with one of its own, under the names that metrics have."""
    own = {
        f"train/learning_rate_group_{number}": schedule.of_group(group, step)
        for number, group in enumerate(optimizer.param_groups)
        if group.get("lr_scale", 1.0) != 1 or "epochs" in group
    }
    return {"train/learning_rate": schedule.learning_rate(step), **own}
