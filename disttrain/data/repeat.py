"""Whether a data set gives the same samples again for the same seed."""

from __future__ import annotations

import time

import torch

from disttrain.data.batching import Batching, ImageSource, SampleSource, Source
from disttrain.data.dataset import MemorySplit, SampleSet, Split, StreamSplit
from disttrain.data.pytree import tensors_in

_NUM_SAMPLES = 8
_NUM_READS = 3  # a picture that is mirrored half of the time is the same three times in one case of four
_LIMIT_S = 2.0  # a set that takes long over each sample is looked at in a few only


def unlike_when_read_again(split: Split | SampleSet, task: Batching) -> str | None:
    """Which part of which sample ("the image of sample 3") differs between reads with one seed; None if none does.

    A few samples are read, spread over the set; `task` collates those that are not images. Raises ConfigurationError
    for one that cannot be.
    """
    if isinstance(split, MemorySplit):
        return None  # tensors
    source: Source = SampleSource(split, task) if isinstance(split, SampleSet) else ImageSource(split)
    parts = ("the image of ", "the label of ") if isinstance(split, StreamSplit) else ()
    began = time.monotonic()
    for index in torch.linspace(0, len(split) - 1, min(_NUM_SAMPLES, len(split))).long().tolist():
        first = [_bits(tensor) for tensor in tensors_in(source.fetch(0, [index]).data)]
        for _ in range(_NUM_READS - 1):
            again = [_bits(tensor) for tensor in tensors_in(source.fetch(0, [index]).data)]
            if first != again:
                unlike = next((part for part, one, other in zip(parts, first, again, strict=False) if one != other), "")
                return f"{unlike}sample {index}"
        if time.monotonic() - began > _LIMIT_S:
            break
    return None


def _bits(tensor: torch.Tensor) -> bytes:
    """Its bytes: a number need not equal itself."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
