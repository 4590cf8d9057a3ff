"""Several batches prepared at once on a GPU: an augmentation is some forty small kernels, however few samples it is of.

What happens to a sample follows from the sample alone, so the batches have the same bits either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from disttrain.data.batching import Batching
from disttrain.data.dataset import MemorySplit, SampleSet, Split
from disttrain.distributed import later

_T = TypeVar("_T")

_MOST_BYTES = 256 * 2**20
_MOST_OF_A_GPU = 1 / 64
_ALIGNMENT = 512
"""Bytes that each allocation on a GPU begins at a multiple of. Kernels are chosen by it, so a batch within a bunch has
to begin at one as well: else its bits could follow from where a run was resumed."""


def samples_at_once(split: Split | SampleSet, task: Batching, device: torch.device, place: torch.device) -> int:
    """How many samples may be prepared at once; 0: each batch by itself.

    Only images that are on the `device` already, `place` being where they are, and of a task that prepares each by
    itself, with a `prepare` of ours: see `ImageClassification.prepares_alone`.
    """
    is_ours = type(task).prepare.__module__.startswith("disttrain.") and getattr(task, "prepares_alone", False)
    if not (is_ours and isinstance(split, MemorySplit) and later.is_asynchronous(device) and place == device):
        return 0
    size = math.prod(split.sample_shape) * torch.float32.itemsize
    return 0 if size % _ALIGNMENT else _most_bytes(device) // size


def _most_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _MOST_BYTES
    return min(_MOST_BYTES, int(torch.cuda.get_device_properties(device).total_memory * _MOST_OF_A_GPU))


def in_bunches(items: Iterator[_T], most: int, size_of: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Runs of `items` whose sizes add up to `most` at most; a larger one is a run of its own."""
    bunch: list[_T] = []
    size = 0
    for item in items:
        if bunch and size + size_of(item) > most:
            yield bunch
            bunch, size = [], 0
        bunch.append(item)
        size += size_of(item)
    if bunch:
        yield bunch
