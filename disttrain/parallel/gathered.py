"""Weights that stay gathered from one pass of a step to the next, where that takes little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from disttrain.distributed.allocator import available_memory
from disttrain.distributed.collectives import max_
from disttrain.distributed.world import World

# Less than a tenth of what the libraries take in every worker.
_LEAST_BYTES = 32 << 20
# Of the memory that is free for each worker once the model is cut: who shards because memory is short keeps little.
_SHARE_OF_FREE = 1 / 16


def affordable_bytes(world: World) -> int:
    """How many bytes of weights each worker may keep gathered: the same on all ranks, and every rank must call it."""
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = available_memory() // world.local_size
    least_of_all = -max_(torch.tensor(-free * _SHARE_OF_FREE, dtype=torch.float64)).item()
    return max(_LEAST_BYTES, int(least_of_all))


class KeptGathered:
    """The weights outside the blocks, which a pass has gathered throughout anyway, and the first blocks that fit.

    Where all fit, FSDP2 has nothing left to do in a pass, and its hooks, which take as long as a small block, are off.
    """

    def __init__(self, root: Any, blocks: Iterable[nn.Module], most_bytes: int, *, frees_after_forward: bool) -> None:
        """All are sharded, each by itself: the root's weights are those that the blocks do not have.

        The blocks may take `most_bytes` in all.
        """
        self._root = root
        self._blocks: list[Any] = []
        self._frees_after_forward = frees_after_forward
        self._is_on = False
        self._is_whole_model = True
        self._put_hooks_back: Callable[[], None] = lambda: None
        left = most_bytes
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
        """Free it: to be called after the last pass of a step, before the weights change, or when a pass has failed."""
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
    taken: list[tuple[dict[int, Any], dict[int, Any], set[int]]] = []
    for module in modules:
        state_of_fsdp = type(module._get_fsdp_state())
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            before = dict(hooks)
            of_fsdp = {
                key for key, hook in before.items() if isinstance(getattr(hook, "__self__", None), state_of_fsdp)
            }
            for key in of_fsdp:
                del hooks[key]
            taken.append((hooks, before, of_fsdp))

    def put_back() -> None:
        for hooks, before, of_fsdp in taken:
            # Others may have come since, or gone.
            stay = {key: hook for key, hook in before.items() if key in of_fsdp or key in hooks}
            since = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(stay | since)

    return put_back
