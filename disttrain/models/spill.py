"""A model that is larger than memory, as its constructor makes it: its large tensors lie in files instead.

The constructor runs as ever and draws the same numbers: a file that is mapped is memory to it. On torch's device "meta"
it would not: `nn.init.trunc_normal_` draws nothing there, and a constructor may look at what it has drawn.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_LARGE = 1 << 20
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


class LargeTensorsInFiles(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which a new large tensor lies in a file once this process has taken so much memory in it.

    The system writes such memory to the disk where it needs room. The files have no names, and are gone with the
    tensors, or with the process. Where there can be none, as on a full disk, a tensor is made in memory. So it is
    without /proc (macOS).
    """

    def __init__(self, folder: Path, most_in_memory: int) -> None:
        """Files are made in `folder`; `most_in_memory` is in bytes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder, self._most = folder, most_in_memory
        self._at_start = _in_memory()
        self.num_files = 0
        """How many tensors have been made in files."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls for each operator."""
        result = func(*args, **(kwargs or {}))
        new = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor) and _is_large(one)]
        if not new or _in_memory() - self._at_start < self._most:
            return result
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = {one.untyped_storage()._cdata for one in inputs if one.layout == torch.strided}
        is_empty = func.overloadpacket.__name__ in _EMPTY and not torch.are_deterministic_algorithms_enabled()

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if not _is_large(tensor) or tensor.untyped_storage()._cdata in there:
                return tensor
            return self._moved(tensor, is_empty=is_empty)

        return tree_map_only(torch.Tensor, moved, result)

    def _moved(self, tensor: torch.Tensor, *, is_empty: bool) -> torch.Tensor:
        memory = tensor.untyped_storage()
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # A disk without room is an error here; it would be the end of the process when the page is written.
                os.posix_fallocate(file.fileno(), 0, memory.nbytes())
                mapped: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", True, memory.nbytes())
        except (OSError, RuntimeError, AttributeError):
            return tensor
        self.num_files += 1
        if not is_empty:
            mapped.copy_(memory)
        return tensor.new_empty(0).set_(mapped, tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_large(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.untyped_storage().nbytes() >= _LARGE
    )


def _in_memory() -> int:
    """What this process has in memory, in bytes, without the pages of files."""
    info: Any = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))
