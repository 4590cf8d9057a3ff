"""What a program hands to `disttrain.train` as objects, in place of what the recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from disttrain.task import Task
from disttrain.training.hooks import Hook


@dataclass(frozen=True)
class Given:
    """Each is None where the recipe's name stands."""

    model: nn.Module | Callable[..., nn.Module] | None = None
    train_set: Any = None
    test_set: Any = None
    task: Task | Callable[..., Task] | None = None
    hooks: Sequence[Hook | Callable[[], Hook]] | Hook | Callable[[], Hook] | None = None

    def names(self) -> frozenset[str]:
        """Which were given."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)
