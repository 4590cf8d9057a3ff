"""Weights that stay gathered from one pass of a step to the next, where that takes little memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# Less than a tenth of what the libraries take in every worker.
_MOST_BYTES = 32 << 20


class KeptGathered:
    """The weights outside the blocks, which a pass has gathered throughout anyway, and the first blocks that fit."""

    def __init__(self, root: Any, blocks: Iterable[nn.Module], *, frees_after_forward: bool) -> None:
        """All are sharded, each by itself: the root's weights are those that the blocks do not have."""
        self._root = root
        self._blocks: list[Any] = []
        self._frees_after_forward = frees_after_forward
        self._is_on = False
        left = _MOST_BYTES
        for block in blocks:
            size = sum(one.numel() * one.element_size() for one in block.parameters())  # whole: the same on all ranks
            if size <= left:
                left -= size
                self._blocks.append(block)

    def begin(self) -> None:
        """Keep what the passes from here on gather."""
        if not self._is_on:
            self._keep(True)

    def end(self) -> None:
        """Free it: to be called after the last pass of a step, before the weights change."""
        if self._is_on:
            self._keep(False)
            for module in (*self._blocks, self._root):
                module.reshard()

    def _keep(self, is_on: bool) -> None:
        self._is_on = is_on
        self._root.set_reshard_after_backward(not is_on, recurse=False)
        for block in self._blocks:
            block.set_reshard_after_backward(not is_on, recurse=False)
            block.set_reshard_after_forward(self._frees_after_forward and not is_on, recurse=False)
