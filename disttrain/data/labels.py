"""All labels of a set of images, as far as they are known without reading each sample."""

from __future__ import annotations

from typing import Any

import torch

from disttrain.data.dataset import MemorySplit


def labels_of(split: Any) -> torch.Tensor | None:
    """(N,) int64, or (N, K) float32 of a set with a number for each class; None if only its samples know them.

    A data set has them in an attribute `targets`, as torchvision's have.
    """
    if isinstance(split, MemorySplit):
        return split.labels
    dataset = getattr(split, "dataset", None)
    try:
        labels = torch.as_tensor(getattr(getattr(dataset, "dataset", dataset), "targets", None))
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.shape == (len(split),) and not labels.is_floating_point():
        return labels.long()
    return labels.float() if labels.shape == (len(split), len(split.classes)) else None
