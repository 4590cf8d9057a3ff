"""Several batches prepared at once on a GPU: an augmentation is some thirty kernels, however few samples it is of.

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
"""Bytes that each allocation on a GPU begins at a multiple of."""


def samples_at_once(split: Split | SampleSet, task: Batching, device: torch.device, place: torch.device) -> int:
    """How many samples may be prepared at once; 0: each batch by itself.

    Only images that are on the `device` already, `place` being where they are, and of a task that prepares each by
    itself, with a `prepare` of ours: see `ImageClassification.prepares_alone`.
    """
    is_ours = type(task).prepare.__module__.startswith("disttrain.") and getattr(task, "prepares_alone", False)
    if not (is_ours and isinstance(split, MemorySplit) and later.is_asynchronous(device) and place == device):
        return 0
    return _most_bytes(device) // (math.prod(split.sample_shape) * torch.float32.itemsize)


def _most_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _MOST_BYTES
    return min(_MOST_BYTES, int(torch.cuda.get_device_properties(device).total_memory * _MOST_OF_A_GPU))


def as_on_its_own(batch: torch.Tensor) -> torch.Tensor:
    """A batch within a bunch, copied unless it begins where memory of its own could.

    Kernels are chosen by where it begins, so its bits could follow from where a run was resumed.
    """
    return batch.clone() if batch.storage_offset() * batch.element_size() % _ALIGNMENT else batch


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
