"""A classifier of images with all that surrounds it, as it is exported: from pixels to probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from disttrain.task.views import over_views


class ServedImages(nn.Module):
    """Images (N, C, H, W) float32 as the data set holds them -> the probability of each class, (N, num_classes).

    Of bytes they are pixels from 0 to 255; without `mean` and `std` they are the floats that a data set gave.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        probabilities: Callable[[torch.Tensor], torch.Tensor],
        views: str = "one",
    ) -> None:
        """`views`: as `over_views` takes it."""
        super().__init__()
        self.model, self.probabilities, self.views = model, probabilities, views
        self.normalised = mean is not None and std is not None
        if self.normalised:
            self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The probabilities."""
        if self.normalised:
            images = ((images / 255) - self.mean) / self.std
        return self.probabilities(over_views(self.model, images, self.views))


def example_images(num: int, sample_shape: tuple[int, ...], *, are_pixels: bool = True) -> torch.Tensor:
    """`num` images of a smooth ramp of grey, (num, C, H, W) float32: whole numbers 0 to 255, or floats of -1 to 1."""
    size = 1
    for length in sample_shape:
        size *= length
    ramp = torch.linspace(0, 255, size).round().reshape(1, *sample_shape)
    images = torch.cat([ramp if i % 2 == 0 else 255 - ramp for i in range(num)])
    return images if are_pixels else images / 127.5 - 1
