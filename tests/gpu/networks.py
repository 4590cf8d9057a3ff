"""A network with what may differ between devices and runs: statistics, kernels with a choice, numbers drawn."""

from __future__ import annotations

from torch import nn


def build(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """BatchNorm, max-pooling and dropout."""
    channels, height, width = sample_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * (height // 4) * (width // 4), num_classes),
    )  # fmt: skip


def in_bfloat16(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """One whose parameters are bfloat16."""
    channels, height, width = sample_shape
    return _Bfloat16(nn.Linear(channels * height * width, num_classes))


class _Bfloat16(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.bfloat16()

    def forward(self, images):  # type: ignore[no-untyped-def]
        return self.inner(images.flatten(1).bfloat16()).float()
