"""Whether a data set gives the same samples again for the same seed."""

from __future__ import annotations

import time

import torch

from disttrain.data.dataset import Split, StreamSplit
from disttrain.data.reader import read_samples

_NUM_SAMPLES = 8
_NUM_READS = 3  # a picture that is mirrored half of the time is the same three times in one case of four
_LIMIT_S = 2.0  # a set that takes long over each sample is looked at in a few only


def unlike_when_read_again(split: Split) -> str | None:
    """Which part of which sample ("the image of sample 3") differs between reads with one seed; None if none does.

    A few samples are read, spread over the set. Raises ConfigurationError for one that cannot be.
    """
    if not isinstance(split, StreamSplit):
        return None  # tensors
    began = time.monotonic()
    for index in torch.linspace(0, len(split) - 1, min(_NUM_SAMPLES, len(split))).long().tolist():
        image, label = read_samples(split, 0, [index])
        for _ in range(_NUM_READS - 1):
            again, label_again = read_samples(split, 0, [index])
            if image.numpy().tobytes() != again.numpy().tobytes():  # bits: a number need not equal itself
                return f"the image of sample {index}"
            if not torch.equal(label, label_again):
                return f"the label of sample {index}"
        if time.monotonic() - began > _LIMIT_S:
            break
    return None
