"""Models whose blocks do what few do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tests.disttrain.parallel.test_fsdp_models import Odd


@dataclass
class Hidden:
    """What the blocks of some libraries return."""

    numbers: torch.Tensor


class Returning(Odd):
    """Blocks that return their numbers in an object, and one that is computed again as a whole."""

    class Block(nn.Sequential):
        def forward(self, x: torch.Tensor) -> Any:
            return Hidden(super().forward(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Returning.Block(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.again = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh())])

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.first(inputs)
        for block in self.blocks:
            x = block(x).numbers
        with set_checkpoint_early_stop(False):
            x = checkpoint(self.again[0], x, use_reentrant=False)
        return self.last(x)  # type: ignore[no-any-return]


class Sparse(Odd):
    """A block whose gradient is sparse."""

    class Block(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward((x[:, 0] > 0).long())

    def __init__(self) -> None:
        super().__init__()
        self.table = Sparse.Block(2, 5, sparse=True)

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(self.first(inputs)))  # type: ignore[no-any-return]
