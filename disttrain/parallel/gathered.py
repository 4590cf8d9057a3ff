"""Weights that stay gathered from one pass of a step to the next, where that takes little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

# Less than a tenth of what the libraries take in every worker.
_MOST_BYTES = 32 << 20


class KeptGathered:
    """The weights outside the blocks, which a pass has gathered throughout anyway, and the first blocks that fit.

    Where all fit, FSDP2 has nothing left to do in a pass, and its hooks, which take as long as a small block, are off.
    """

    def __init__(self, root: Any, blocks: Iterable[nn.Module], *, frees_after_forward: bool) -> None:
        """All are sharded, each by itself: the root's weights are those that the blocks do not have."""
        self._root = root
        self._blocks: list[Any] = []
        self._frees_after_forward = frees_after_forward
        self._is_on = False
        self._is_whole_model = True
        self._put_hooks_back: Callable[[], None] = lambda: None
        left = _MOST_BYTES
        for block in blocks:
            size = sum(one.numel() * one.element_size() for one in block.parameters())  # whole: the same on all ranks
            if size <= left:
                left -= size
                self._blocks.append(block)
            else:
                self._is_whole_model = False

    def begin(self) -> None:
        """Keep what the passes from here on gather."""
        if self._is_on:
            return
        self._keep(True)
        if self._is_whole_model:
            modules = [self._root, *self._blocks]
            for module in modules:
                module.unshard()
            self._put_hooks_back = take_hooks_of_fsdp_off(modules)

    def end(self) -> None:
        """Free it: to be called after the last pass of a step, before the weights change."""
        if self._is_on:
            self._put_hooks_back()
            self._keep(False)
            for module in (*self._blocks, self._root):
                module.reshard()

    def _keep(self, is_on: bool) -> None:
        self._is_on = is_on
        self._root.set_reshard_after_backward(not is_on, recurse=False)
        for block in self._blocks:
            block.set_reshard_after_backward(not is_on, recurse=False)
            block.set_reshard_after_forward(self._frees_after_forward and not is_on, recurse=False)


def take_hooks_of_fsdp_off(modules: Iterable[Any]) -> Callable[[], None]:
    """Take FSDP2's hooks on the `forward` of these modules off; what is returned puts them back where they were."""
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in modules:
        state_of_fsdp = type(module._get_fsdp_state())
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            taken.append((hooks, dict(hooks)))
            for key, hook in dict(hooks).items():
                if isinstance(getattr(hook, "__self__", None), state_of_fsdp):
                    del hooks[key]

    def put_back() -> None:
        for hooks, before in taken:
            since = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(before | since)

    return put_back
