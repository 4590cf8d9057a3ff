"""The convolutional network of PyTorch's CIFAR-10 tutorial."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from disttrain.errors import ConfigurationError


class Net(nn.Module):
    """Two convolutions of 6 and 16 channels and three linear layers; 62,006 parameters for 3 x 32 x 32 and 10 classes.

    Same names, order of construction and initialisation as in
    https://pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html, so the same seed gives the same weights. Takes
    (B, C, H, W) float32 with any C, and H and W of 16 or more; raises ConfigurationError for less.
    """

    def __init__(self, num_classes: int = 10, sample_shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        super().__init__()
        channels, height, width = sample_shape
        rows, columns = _after_convolutions(height), _after_convolutions(width)
        if rows < 1 or columns < 1:
            raise ConfigurationError(
                f"model.name: 'net' needs images of at least 16 x 16 pixels, and these are {height} x {width}."
            )
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * rows * columns, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (B, num_classes)."""
        x = self.pool(functional.relu(self.conv1(images)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        logits: torch.Tensor = self.fc3(x)
        return logits


def _after_convolutions(side: int) -> int:
    """What two convolutions of 5 x 5 without padding, each followed by halving, leave of `side` pixels."""
    return ((side - 4) // 2 - 4) // 2
