"""Crops, flips and normalisation of bytes to the bits of `augment` and `normalise`, where each call is a kernel.

A crop and a flip only move pixels, so one kernel gathers them for both. And there are 256 bytes: what each comes to in
each channel is looked up in a table that the CPU has made, by its divisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from disttrain.data.normalise import normalise

_NUM_BYTES = 256


def shown(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    padding: int = 0,
    reflect: bool = False,
    u: torch.Tensor | None = None,
    mirrored: torch.Tensor | None = None,
) -> torch.Tensor:
    """`images` (B, C, H, W) uint8, cropped, mirrored and normalised: float32, contiguous.

    `padding`, `reflect` and `u` (B, 2) are those of `augment.crop`; `mirrored` (B,) bool says which are turned. Three
    kernels go over the images, or two over such as stay where they are.
    """
    first, table = _looked_up(tuple(mean), tuple(std), images.device)
    if padding and u is not None:
        index = _cropped(images, first, padding, u, mirrored, reflect=reflect)
    elif mirrored is not None:
        index = first + _gathered(images, _axes(images, 0)[0].index_select(0, mirrored.long()))
    else:
        index = first + images
    # Not a view: what a task's own collate makes may be channels-last.
    return table.index_select(0, index.reshape(-1)).view(images.shape)


def _cropped(
    images: torch.Tensor,
    first: torch.Tensor,
    padding: int,
    u: torch.Tensor,
    mirrored: torch.Tensor | None,
    *,
    reflect: bool,
) -> torch.Tensor:
    """Where in the table each pixel of the windows is, (B, C, H, W) int32."""
    turns, last = _axes(images, padding)
    start = turns[:1] if mirrored is None else turns.index_select(0, mirrored.long())
    places = start + (u * (2 * padding + 1)).long()[:, :, None]
    if reflect:
        return first + _gathered(images, last - (last - places.abs()).abs())
    inside = places.clamp(torch.zeros_like(last), last)
    is_inside = inside == places
    height, width = images.shape[2:]
    rows, columns = is_inside[:, 0, None, :height, None], is_inside[:, 1, None, None, :width]
    # Black beyond the edge: byte 0, as `crop` pads bytes.
    return torch.addcmul(first, _gathered(images, inside), rows & columns)


def _gathered(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The pixels at `places`, (B, 2, longer side) int64: rows and columns."""
    batch, channels, height, width = images.shape
    one, each = _numbered(batch, images.device), _numbered(channels, images.device)
    rows, columns = places[:, 0, None, :height, None], places[:, 1, None, None, :width]
    return images[one[:, None, None, None], each[:, None, None], rows, columns]


def _axes(images: torch.Tensor, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `_axes_on`."""
    return _axes_on(images.shape[2], images.shape[3], padding, images.device)


@lru_cache(maxsize=16)  # what is here is made on the CPU, and a GPU would wait for each copy
def _axes_on(height: int, width: int, padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows and columns the first window begins at: (2, 2, longer side) int64, as it is and turned left to right.

    And the last row and the last column: (2, 1) int64.
    """
    rows, columns = torch.arange(max(height, width)), torch.arange(max(height, width))
    turns = torch.stack([torch.stack([rows, columns]), torch.stack([rows, width - 1 - columns])]) - padding
    return turns.to(device), torch.tensor([[height - 1], [width - 1]]).to(device)


@lru_cache(maxsize=16)
def _numbered(num: int, device: torch.device) -> torch.Tensor:
    return torch.arange(num, device=device)


@lru_cache(maxsize=16)
def _looked_up(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each channel's part of the table begins, (C, 1, 1) int32, and the table, (C * 256,) float32."""
    images = torch.arange(_NUM_BYTES, dtype=torch.uint8).expand(1, len(mean), 1, _NUM_BYTES)
    first = torch.arange(0, len(mean) * _NUM_BYTES, _NUM_BYTES, dtype=torch.int32).view(-1, 1, 1)
    return first.to(device), normalise(images, mean, std).reshape(-1).to(device)
