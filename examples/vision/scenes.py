"""Scenes of handwritten digits: where each one is, what it says, and to which digit each pixel belongs."""

import numpy as np
import torch
from sklearn.datasets import load_digits

SIZE = 48  # pixels a side


def scene(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
    """A scene of one to four digits of 12 to 18 pixels, none touching another.

    image: (1, 48, 48) float32 in 0..1; boxes: (n, 4) float32, as x0 y0 x1 y1; labels: (n,) int64, the digit + 1;
    classes: (48, 48) int64, of each pixel: 0 for paper, else the digit + 1.
    """
    image = rng.uniform(0.0, 0.3, (SIZE, SIZE)).astype(np.float32)  # noisy paper
    classes, boxes, names = np.zeros((SIZE, SIZE), np.int64), [], []
    for _ in range(rng.integers(1, 5)):
        which, size = rng.integers(len(digits)), rng.integers(12, 19)
        pixels = np.arange(size) * 8 // size  # enlarged by repeating pixels
        ink = digits[which][pixels][:, pixels] / 16
        rows, columns = (np.flatnonzero(ink.max(axis) > 0.4) for axis in (1, 0))
        top, left = rng.integers(0, SIZE - size, 2)
        place = np.s_[top : top + size, left : left + size]
        if classes[place].any():
            continue
        image[place] = np.maximum(image[place], ink)
        classes[place] = np.where(ink > 0.4, labels[which] + 1, 0)
        boxes.append([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1])
        names.append(labels[which] + 1)
    return {
        "image": torch.from_numpy(image)[None],
        "boxes": torch.tensor(np.array(boxes), dtype=torch.float32),
        "labels": torch.tensor(np.array(names), dtype=torch.int64),
        "classes": torch.from_numpy(classes),
    }


def load(num_train: int = 1000, num_test: int = 200):
    """(training scenes, test scenes): of digits by different writers."""
    digits, rng = load_digits(), np.random.default_rng(0)
    train, test = ((digits.images[part], digits.target[part]) for part in (slice(1400), slice(1400, None)))
    return [scene(rng, *train) for _ in range(num_train)], [scene(rng, *test) for _ in range(num_test)]
