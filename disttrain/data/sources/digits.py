"""The 1,797 real handwritten digits that scikit-learn ships: data that is always there."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from disttrain import rng
from disttrain.data.dataset import Datasets, MemorySplit
from disttrain.errors import ConfigurationError

_NUM_TEST = 360
_SPLIT_SEED = 0
_CLASSES = tuple(str(digit) for digit in range(10))
# Of the training images, over all pixels; the three channels are the same grey.
_MEAN, _STD = (0.3044,) * 3, (0.3755,) * 3


def load_digits_split() -> Datasets:
    """1,437 training and 360 test images, (3, 32, 32): 8 x 8 pixels of 17 greys, each pixel made a square of 16.

    The split is fixed. Raises ConfigurationError without scikit-learn.
    """
    pixels, digits = _read()
    greys = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8))
    images = greys.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.astype(np.int64))
    order = rng.permutation(_SPLIT_SEED, 0, len(labels))

    def split(chosen: torch.Tensor) -> MemorySplit:
        return MemorySplit(images[chosen], labels[chosen], _CLASSES, _MEAN, _STD)

    return Datasets(split(order[_NUM_TEST:]), split(order[:_NUM_TEST]))


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Pixels from 0 to 16, (n, 8, 8) float64, and digits, (n,).

    From scikit-learn's file rather than by its `load_digits`: importing it takes every worker 1.4 s of processor time.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin if package and package.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",")
    except FileNotFoundError as error:
        raise ConfigurationError("data.dataset: 'digits' comes with scikit-learn; pip install scikit-learn.") from error
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
