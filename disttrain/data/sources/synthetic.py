"""Made-up images, for benchmarks and tests: fixed, of any size, and a little learnable."""

from __future__ import annotations

import inspect

import torch

from disttrain import rng
from disttrain.data.dataset import Datasets, MemorySplit
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe


def load_synthetic(data: DataRecipe) -> Datasets:
    """`synthetic_images` with `data.options` as arguments. Raises ConfigurationError for an option it does not have."""
    known = inspect.signature(synthetic_images).parameters
    for name, value in data.options.items():
        if name not in known:
            raise ConfigurationError(f"data.options.{name}: 'synthetic' has no such option; it has {', '.join(known)}.")
        least = 0 if name == "seed" else 1
        if type(value) is not int or value < least:
            raise ConfigurationError(f"data.options.{name}: {value!r} is not a whole number of {least} or more.")
    return synthetic_images(**data.options)


def synthetic_images(
    num_train: int = 2000,
    num_test: int = 500,
    num_classes: int = 10,
    image_size: int = 32,
    channels: int = 3,
    seed: int = 0,
) -> Datasets:
    """Noise over a pattern of each class's own, an eighth as strong; the same images for the same arguments."""
    generator = torch.Generator().manual_seed(rng.derive(seed))
    shape = (channels, image_size, image_size)
    patterns = torch.randint(0, 32, (num_classes, *shape), dtype=torch.uint8, generator=generator)
    classes = tuple(f"class {number}" for number in range(num_classes))

    def split(num_samples: int) -> MemorySplit:
        labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
        images = torch.randint(0, 224, (num_samples, *shape), dtype=torch.uint8, generator=generator)
        images += patterns[labels]
        return MemorySplit(images, labels, classes, (0.5,) * channels, (0.25,) * channels)

    return Datasets(split(num_train), split(num_test))
