"""Handwritten digits on pieces of photographs, as a folder of pictures of one's own, and a network for them."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

SIZE = 32


def write_folder(root: Path, num_train: int = 1400) -> None:
    """Write root/{train,test}/<digit>/<number>.png: 1,400 and 397 pictures, by different writers."""
    rng = np.random.default_rng(0)
    photographs, digits = load_sample_images().images, load_digits()
    for number, (strokes, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(length - SIZE) for length in photograph.shape[:2])
        paper = photograph[top : top + SIZE, left : left + SIZE].astype(float)
        ink = np.asarray(
            Image.fromarray((strokes * 15.9).astype("uint8")).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        )
        picture = np.abs(paper - ink[..., None])  # as in MNIST-M: the strokes turn the photograph into its negative
        folder = root / ("train" if number < num_train else "test") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype("uint8")).save(folder / f"{number:04}.png")


class Residual(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x):
        hidden = self.first_norm(self.first(x)).relu()
        return (x + self.second_norm(self.second(hidden))).relu()


def network(num_classes: int, width: int = 24) -> nn.Module:
    """(B, 3, 32, 32) -> (B, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.MaxPool2d(2),
        Residual(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        Residual(2 * width),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


if __name__ == "__main__":
    shutil.rmtree("pictures", ignore_errors=True)
    write_folder(Path("pictures"))
