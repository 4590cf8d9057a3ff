"""Augmentation of whole batches, without a loop over samples.

Each function takes numbers `u` in [0, 1) from `rng.uniform`, one row per image, and is a pure function of them: what
happens to a sample follows from (seed, epoch, sample), whatever batch and worker it is in.

`crop` and `flip` work on raw pixels, as torchvision's `RandomCrop` and `RandomHorizontalFlip` do in the usual recipes:
the padding is black, and a byte moves four times faster than a float. `cutout` works on normalised images, where zero
is the mean colour, as in its paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from disttrain.distributed import later

NUM_UNIFORM = 5
"""How many numbers a sample gets. Each function has columns of its own, so turning one on leaves the others alone."""
CROP_COLUMNS, FLIP_COLUMN, CUTOUT_COLUMNS = slice(0, 2), 2, slice(3, 5)


def crop(images: torch.Tensor, padding: int, u: torch.Tensor, *, reflect: bool = False) -> torch.Tensor:
    """Pad each side by `padding` zeros and cut out the old size at random. `images`: (B, C, H, W), `u`: (B, 2).

    With `reflect` the padding mirrors the image at its outermost pixels, which are not doubled.
    """
    batch, _, height, width = images.shape
    offsets = (u * (2 * padding + 1)).long()
    padded = reflected(images, padding) if reflect else functional.pad(images, (padding, padding, padding, padding))
    # A view that holds every possible window, (B, C, 2 * padding + 1, 2 * padding + 1, H, W): indexing copies one each.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    if _is_on_cpu(images) and images.dtype == torch.uint8:  # NumPy copies whole rows, PyTorch byte by byte
        top, left = offsets.numpy().T
        return torch.from_numpy(windows.numpy()[np.arange(batch), :, top, left])
    return windows[torch.arange(batch, device=images.device), :, offsets[:, 0], offsets[:, 1]]


def _is_on_cpu(images: torch.Tensor) -> bool:
    """Whether NumPy's copies of whole rows and images are faster than a few operations on all of them."""
    return images.device.type == "cpu" and not later.is_asynchronous(images.device)


def reflected(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Pad each side by `padding` pixels, which mirror the image: (B, C, H, W), of any type.

    `functional.pad` cannot do so with bytes. The padding may be at most one less than the image's side.
    """
    for dim in (2, 3):
        side = images.shape[dim]
        places = torch.arange(-padding, side + padding, device=images.device).abs()
        images = images.index_select(dim, (side - 1) - ((side - 1) - places).abs())
    return images


def mirrored_by_chance(u: torch.Tensor) -> torch.Tensor:
    """Which images to mirror, (B,) bool, each with probability one half. `u`: (B,)."""
    return u < 0.5


def mirrored_alternately(u: torch.Tensor, epoch: int) -> torch.Tensor:
    """Which images to mirror, (B,) bool: those that the epoch before has not; at first, those with u < 0.5.

    `u`: (B,), the same in every epoch. So two epochs show both sides of every image, where chance shows half of them
    one side twice: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """
    return u < 0.5 if epoch % 2 == 0 else u >= 0.5


def mirror(images: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Mirror left to right those of `which`, (B,) bool. `images`: (B, C, H, W)."""
    if _is_on_cpu(images):  # whole images are copied; `where` looks at each number: six times as long
        mirrored, chosen = images.clone(memory_format=torch.contiguous_format), which.nonzero()[:, 0]
        of_chosen = images.index_select(0, chosen).flip(-1)
        # As bytes, in NumPy: PyTorch's assignment by index goes number by number as well.
        mirrored.view(torch.uint8).numpy()[chosen.numpy()] = of_chosen.contiguous().view(torch.uint8).numpy()
        return mirrored
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


def cutout(images: torch.Tensor, side: int, u: torch.Tensor) -> torch.Tensor:
    """Set a square of `side` pixels to zero; its centre is anywhere in the image, so that it may stick out.

    `images`: (B, C, H, W), `u`: (B, 2). DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks
    with Cutout", 2017.
    """
    height, width = images.shape[-2:]
    top = (u[:, 0] * height).long() - side // 2
    left = (u[:, 1] * width).long() - side // 2
    rows = torch.arange(height, device=images.device) - top[:, None]
    columns = torch.arange(width, device=images.device) - left[:, None]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return images.masked_fill(inside[:, None], 0)
