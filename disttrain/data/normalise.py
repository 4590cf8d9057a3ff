"""From bytes to what a network takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def normalise(
    images: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """`((images.float() / 255) - mean) / std`, bit for bit, for `images` (B, C, H, W) uint8; the result is float32.

    The same formula, in the same order, as torchvision's `ToTensor` and `Normalize`. `mean` and `std` are per channel:
    C numbers, or tensors that `per_channel` made of them once.
    """
    mean, std = per_channel(mean, images.device), per_channel(std, images.device)
    # In place on the fresh copy: one allocation instead of four, the same bits.
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def normaliser(
    mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`normalise` with a split's `mean` and `std`; without them (floats) images pass as they are."""
    if mean is None or std is None:
        return lambda images: images
    mean_there, std_there = per_channel(mean, device), per_channel(std, device)
    return lambda images: normalise(images, mean_there, std_there)


def per_channel(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """One number per channel as (C, 1, 1) float32, which stretches over a batch of images; tensors pass as they are."""
    if isinstance(values, torch.Tensor):
        return values
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
