"""A small convolutional network that learns CIFAR-10 in a few epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from disttrain.errors import ConfigurationError

_MOMENTUM = 0.4  # of the running statistics, which have some two hundred steps to settle
_EPS = 1e-12


class Airbench(nn.Module):
    """A convolution of 2 x 2 (`whiten`), three groups of two convolutions of 3 x 3, and a linear layer (`head`).

    As Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), describes it: GELU, BatchNorm with
    biases to learn and scales of one, the pooling behind each group's first convolution. 1,972,792 parameters for 3
    channels and 10 classes. Much of what makes it fast is in the recipe `cifar10-fast`: filters that whiten, and
    filters that pass on their input. Takes (B, C, H, W) with H and W of 9 or more, or of less with fewer groups.
    """

    def __init__(
        self,
        num_classes: int = 10,
        sample_shape: tuple[int, int, int] = (3, 32, 32),
        widths: Sequence[int] = (64, 256, 256),
    ) -> None:
        """`widths`: the channels of each group."""
        super().__init__()
        channels, height, width = sample_shape
        if not widths or any(type(one) is not int or one < 1 for one in widths):
            raise ConfigurationError(f"model.options.widths: {widths!r} is not a list of numbers of channels.")
        rows, columns = (_after_groups(side, len(widths)) for side in (height, width))
        if min(rows, columns) < 1:
            raise ConfigurationError(
                f"model.name: 'airbench' with {len(widths)} groups halves images {len(widths)} times, and these are "
                f"{height} x {width}: give fewer model.options.widths."
            )
        whitened = 2 * channels * 2 * 2  # a filter for each direction of a patch, and its negative
        self.whiten = nn.Conv2d(channels, whitened, 2)
        self.groups = nn.Sequential(
            *(_Group(before, after) for before, after in zip([whitened, *widths], widths, strict=False))
        )
        self.pool = nn.MaxPool2d((min(3, rows), min(3, columns)))
        features = widths[-1] * (rows // min(3, rows)) * (columns // min(3, columns))
        self.head = nn.Linear(features, num_classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (B, num_classes)."""
        features = self.pool(self.groups(functional.gelu(self.whiten(images)))).flatten(1)
        logits: torch.Tensor = self.head(features) / features.shape[1]
        return logits


class _Group(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm1 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = _norm(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.norm1(functional.max_pool2d(self.conv1(x), 2)))
        return functional.gelu(self.norm2(self.conv2(x)))


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=_EPS, momentum=_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


def _after_groups(side: int, num_groups: int) -> int:
    side -= 1
    for _ in range(num_groups):
        side //= 2
    return side
