"""Hooks: a user's own code at agreed points of the training, the same on every worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disttrain.errors import ConfigurationError, DisttrainError, brief, failure_of, is_circumstance
from disttrain.recipe.reference import import_callable
from disttrain.task.signatures import check_signatures


@dataclass(frozen=True)
class HookContext:
    """What a hook may look at, and change: whatever it changes, it has to change alike on every worker."""

    step: int
    """The steps done, over all epochs."""
    total_steps: int
    epoch: int
    """The epochs done."""
    model: nn.Module
    """The bare model. Between two steps, so its parameters have no gradients."""
    optimizer: torch.optim.Optimizer
    metrics: Mapping[str, float]
    """The evaluation at this step, as the task names its metrics; empty if none was made yet."""
    run_dir: Path
    rank: int
    world_size: int
    log: Callable[[Mapping[str, float]], None]
    """Puts metrics of this step into the journal, MLflow and (those named train/… or eval/…) charts; rank 0's count."""
    as_evaluated: Callable[[], AbstractContextManager[None]]
    """A context in which the model has the weights that are evaluated: with `train.ema_decay` their averages."""


class Hook:
    """Subclass it and define what is needed. Every rank has one of its own and calls it at the same steps.

    What it does must follow from its arguments, its state and the seed alone, or the bits of a run that was killed and
    resumed may differ. A step that is made again after a kill is seen again, with the state of the checkpoint.
    """

    def after_step(self, context: HookContext) -> None:
        """After each step, and before its checkpoint, if it has one."""

    def after_evaluation(self, context: HookContext) -> None:
        """After each evaluation, and before its checkpoint."""

    def at_end(self, context: HookContext) -> None:
        """Once the run is finished: after its last evaluation, or when it is started again before it was concluded."""

    def state(self) -> Any:
        """What a checkpoint has of it, as JSON can hold it; rank 0's counts. None (the default): nothing.

        A hook that keeps anything returns it each time, also while it is empty: what is not in a checkpoint is not put
        back, and an object that was given stays as it is when the run goes back to one after a spike.
        """
        return None

    def load_state(self, state: Any) -> None:
        """Put back what `state` gave, on every rank; called before the first step of a run that is resumed."""


class Hooks:
    """A run's hooks, by names under which a checkpoint has their state."""

    def __init__(self, hooks: Mapping[str, Hook]) -> None:
        self._hooks = dict(hooks)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._hooks)

    def after_step(self, context: HookContext) -> None:
        """Call each, in the order of the recipe. Raises UserCodeError, which names the hook, for what it raises."""
        for name, hook in self._hooks.items():
            with _named(name, "after_step"):
                hook.after_step(context)

    def after_evaluation(self, context: HookContext) -> None:
        """As `after_step`."""
        for name, hook in self._hooks.items():
            with _named(name, "after_evaluation"):
                hook.after_evaluation(context)

    def at_end(self, context: HookContext) -> None:
        """As `after_step`."""
        for name, hook in self._hooks.items():
            with _named(name, "at_end"):
                hook.at_end(context)

    def state(self) -> dict[str, Any]:
        """The state of those that have one. Raises ConfigurationError for one that JSON cannot hold."""
        states: dict[str, Any] = {}
        for name, hook in self._hooks.items():
            with _named(name, "state"):
                state = hook.state()
            if state is None:
                continue
            try:
                states[name] = json.loads(json.dumps(state, allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigurationError(
                    f"the hook {name}: its state cannot be saved as JSON ({brief(error)}): give numbers, texts, lists "
                    "and dicts."
                ) from error
        return states

    def load_state(self, states: Mapping[str, Any], where: object) -> None:
        """Put back what `state` gave. Raises ConfigurationError if one of them is not there now."""
        lost = [name for name in states if name not in self._hooks]
        if lost:
            raise ConfigurationError(
                f"{where}: trained with the hook {brief(lost[0])}, whose state is in the checkpoint: give it again, or "
                "start a new --run-dir."
            )
        for name, state in states.items():
            with _named(name, "load_state"):
                self._hooks[name].load_state(state)


def build_hooks(references: Sequence[str], given: Any) -> Hooks:
    """The hooks that `train.hooks` names, then those that were given: objects, or classes that are called.

    `given` is a sequence of them, or a single one. Raises ConfigurationError for anything else.
    """
    made: dict[str, Hook] = {}
    if isinstance(given, Hook) or callable(given) or not isinstance(given, Iterable):
        given = (given,)
    for hook in (*(import_callable(reference, "train.hooks") for reference in references), *given):
        made_one = hook
        if not isinstance(hook, Hook) and callable(hook):
            with _named(getattr(hook, "__qualname__", type(hook).__name__), "its constructor"):
                made_one = hook()
        if not isinstance(made_one, Hook):
            raise ConfigurationError(f"train.hooks: a {type(made_one).__name__} is not a disttrain.Hook; subclass it.")
        stem = f"{type(made_one).__module__}:{type(made_one).__qualname__}"
        check_signatures(made_one, Hook, f"the hook {stem}")
        name, number = stem, 1
        while name in made:
            number += 1
            name = f"{stem}-{number}"
        made[name] = made_one
    return Hooks(made)


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except DisttrainError:
        raise
    except Exception as error:
        if is_circumstance(error):  # a hook may have collectives of its own
            raise
        raise failure_of(f"the hook {name}, {what}", error) from error
