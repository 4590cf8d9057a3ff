"""ResNet-18 in its CIFAR form."""

from __future__ import annotations

from torch import nn


def resnet18(num_classes: int = 10, sample_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """ResNet-18 for small images: a first convolution of 3 x 3 and stride 1, and no max-pooling after it.

    11,173,962 parameters for 3 channels and 10 classes. Everything else, names and initialisation included, is
    torchvision's `resnet18` (He et al., "Deep Residual Learning for Image Recognition", 2015).
    """
    from torchvision.models import resnet18 as torchvision_resnet18  # takes a second, which `net` need not wait

    model: nn.Module = torchvision_resnet18(num_classes=num_classes)
    stem = nn.Conv2d(sample_shape[0], 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model
