"""Parameter groups: which parameters have a weight decay or a learning rate of their own, by name or by the task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from disttrain.errors import ConfigurationError
from disttrain.models.patterns import matching
from disttrain.recipe import OptimRecipe

Group = dict[str, Any]
"""As torch's optimizers take it: `params`, options, and `lr_scale`, which the schedule's rate is multiplied by."""


def parameter_groups(
    recipe: OptimRecipe, model: nn.Module, of_task: Sequence[Mapping[str, Any]] | None = None
) -> list[Group]:
    """The optimizer's groups: those of the task, if it gives any, else those that the recipe describes.

    A parameter belongs to the first of `optim.groups` that matches its name, the others to a group without options of
    its own. Raises ConfigurationError for a pattern that matches nothing, and for groups of a task that do not fit.
    """
    named = dict(model.named_parameters())
    if of_task is not None:
        if recipe.groups or not recipe.decay_biases_and_norms:
            raise ConfigurationError(
                "optim: the task gives the optimizer's parameter groups itself (param_groups); leave out groups and "
                "decay_biases_and_norms."
            )
        return _checked(of_task, named)
    options: dict[str, tuple[float | None, float]] = {}
    for number, group in enumerate(recipe.groups):
        key = f"optim.groups.{number}.match"
        found = [name for name in matching(group.match, named, key) if name not in options]
        if not found:
            raise ConfigurationError(
                f"{key}: earlier groups already have every parameter that it matches; the first match counts, so put "
                "the narrower pattern first."
            )
        options |= dict.fromkeys(found, (group.weight_decay, group.lr_scale))
    members: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decay, scale = options.get(name, (None, 1.0))
        if decay is None and not recipe.decay_biases_and_norms and parameter.ndim < 2:
            decay = 0.0
        members.setdefault((decay, scale), []).append(parameter)
    if set(members) == {(None, 1.0)}:
        return [{"params": members[None, 1.0]}]
    return [
        {"params": parameters, "lr_scale": scale, **({} if decay is None else {"weight_decay": decay})}
        for (decay, scale), parameters in members.items()
    ]


def _checked(groups: Sequence[Mapping[str, Any]], named: Mapping[str, nn.Parameter]) -> list[Group]:
    """A task's groups with their parameters listed: each of the model's is in one of them.

    Those that are frozen may be left out; they are in a last group without options, for a hook may unfreeze them.
    """
    checked, of = [], {id(parameter): name for name, parameter in named.items()}
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ConfigurationError("the task's param_groups: each group is a dict with 'params'.")
        if "lr" in group:
            raise ConfigurationError(
                "the task's param_groups: a group gives 'lr_scale', relative to optim.lr, in place of 'lr'."
            )
        scale = group.get("lr_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ConfigurationError(
                f"the task's param_groups: lr_scale is {scale!r}, and has to be a number of 0 or more."
            )
        given: Any = group["params"]
        if not isinstance(given, nn.Parameter | Iterable):
            raise ConfigurationError(
                f"the task's param_groups: 'params' is a {type(given).__name__}, not a parameter or several of them."
            )
        members = [given] if isinstance(given, nn.Parameter) else list(given)
        for parameter in members:
            if id(parameter) not in of:
                raise ConfigurationError(
                    "the task's param_groups: one parameter is in two groups, or not one of the model's."
                )
            del of[id(parameter)]
        checked.append({**group, "params": members})
    left_out = [name for name in of.values() if named[name].requires_grad]
    if left_out:
        raise ConfigurationError(
            f"the task's param_groups: '{left_out[0]}' is in none of the groups; freeze it if it is not to be trained."
        )
    frozen = [named[name] for name in of.values()]
    return [*checked, {"params": frozen}] if frozen else checked
