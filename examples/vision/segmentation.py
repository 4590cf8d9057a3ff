"""Segmentation: which digit does each pixel belong to? A small U-Net, and the mean intersection over union."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from disttrain import Task

NUM_CLASSES = 11  # paper, and ten digits


class Segmentation(Task):
    """The loss is a sum over pixels, and says so: `weight` counts them."""

    best = ("miou", "max")
    items = "pixels"

    def weight(self, batch):
        return batch["classes"].numel()

    def collate(self, scenes):
        return {name: torch.stack([one[name] for one in scenes]) for name in ("image", "classes")}

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["image"]), batch["classes"], reduction="sum")

    def score(self, model, batch):
        found = model(batch["image"]).argmax(1)
        pairs = (batch["classes"] * NUM_CLASSES + found).flatten()
        return {"loss": self.loss(model, batch), "pairs": torch.bincount(pairs, minlength=NUM_CLASSES**2)}

    def metrics(self, sums, weight):
        pairs = sums["pairs"].reshape(NUM_CLASSES, NUM_CLASSES).double()  # [is, found]
        overlaps = pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())  # NaN for a class that no pixel has
        return {"loss": sums["loss"].item() / weight, "miou": overlaps.nanmean().item()}


def block(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


class UNet(nn.Module):
    """(B, 1, H, W) -> (B, 11, H, W), H and W multiples of 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([1, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.join = nn.ModuleList(block(2 * a, a) for a in widths[:-1])
        self.classes = nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, x):
        seen = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            seen.append(x)
        for level in reversed(range(len(self.up))):
            x = self.join[level](torch.cat([seen[level], self.up[level](x)], 1))
        return self.classes(x)
