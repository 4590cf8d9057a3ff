"""Parameter groups: which parameters have a weight decay or a learning rate of their own, by name or by the task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from disttrain.errors import ConfigurationError
from disttrain.models.patterns import matching
from disttrain.recipe import OptimRecipe
from disttrain.recipe.optimizers import MuonRecipe

Group = dict[str, Any]
"""As torch's optimizers take it: `params`, options, and `lr_scale`, which the schedule's rate is multiplied by."""


@dataclass(frozen=True)
class _Options:
    """What is different for a parameter; None: nothing."""

    weight_decay: float | None = None
    lr_scale: float = 1.0
    epochs: float | None = None
    of_other: bool = False

    def given(self) -> Group:
        """As a group has them."""
        return {
            "lr_scale": self.lr_scale,
            **({} if self.weight_decay is None else {"weight_decay": self.weight_decay}),
            **({} if self.epochs is None else {"epochs": self.epochs}),
            **({"orthogonalised": False} if self.of_other else {}),
        }


_ALIKE = _Options()


def parameter_groups(
    recipe: OptimRecipe, model: nn.Module, of_task: Sequence[Mapping[str, Any]] | None = None
) -> list[Group]:
    """The optimizer's groups: those of the task, if it gives any, else those that the recipe describes.

    A parameter belongs to the first of `optim.groups` that matches its name, the others to a group without options of
    its own. Raises ConfigurationError for a pattern that matches nothing, and for groups of a task that do not fit.
    """
    named = dict(model.named_parameters())
    others = recipe.other_match if isinstance(recipe, MuonRecipe) else []
    if of_task is not None:
        if recipe.groups or not recipe.decay_biases_and_norms or others:
            raise ConfigurationError(
                "optim: the task gives the optimizer's parameter groups itself (param_groups); leave out groups, "
                "decay_biases_and_norms and other_match."
            )
        return _checked(of_task, named)
    options: dict[str, _Options] = {}
    for number, group in enumerate(recipe.groups):
        key = f"optim.groups.{number}.match"
        found = [name for name in matching(group.match, named, key) if name not in options]
        if not found:
            raise ConfigurationError(
                f"{key}: earlier groups already have every parameter that it matches; the first match counts, so put "
                "the narrower pattern first."
            )
        options |= dict.fromkeys(found, _Options(group.weight_decay, group.lr_scale, group.epochs))
    of_other = matching(others, named, "optim.other_match")
    members: dict[_Options, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        of = replace(options.get(name, _ALIKE), of_other=name in of_other)
        if of.weight_decay is None and not recipe.decay_biases_and_norms and parameter.ndim < 2:
            of = replace(of, weight_decay=0.0)
        members.setdefault(of, []).append(parameter)
    if set(members) == {_ALIKE}:
        return [{"params": members[_ALIKE]}]
    return [{"params": parameters, **of.given()} for of, parameters in members.items()]


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
        epochs = group.get("epochs")
        if epochs is not None and (
            isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf
        ):
            raise ConfigurationError(f"the task's param_groups: epochs is {epochs!r}, and has to be a number above 0.")
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
