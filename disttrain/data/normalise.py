"""From bytes to what a network takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


def normalise(
    images: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """`((images.float() / 255) - mean) / std`, bit for bit, for `images` (B, C, H, W) uint8; the result is float32.

    The same formula, in the same order, as torchvision's `ToTensor` and `Normalize`. `mean` and `std` are per channel:
    C numbers, or tensors that `per_channel` made of them once.
    """
    mean, std = per_channel(mean, images.device), per_channel(std, images.device)
    # By a plain number a GPU does not divide: it multiplies by the inverse, which is another bit for half of all bytes.
    largest = 255 if images.device.type == "cpu" else per_channel((255.0,), images.device)
    # In place on the fresh copy: one allocation instead of four, the same bits.
    return images.to(torch.float32).div_(largest).sub_(mean).div_(std)


def per_channel(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """One number per channel as (C, 1, 1) float32, which stretches over a batch of images; tensors pass as they are."""
    return values if isinstance(values, torch.Tensor) else _on_device(tuple(values), device)


@lru_cache(maxsize=16)  # every batch asks, and on a GPU each copy would wait for it
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
