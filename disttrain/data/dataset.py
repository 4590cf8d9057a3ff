"""What a data set is to the rest of the project: a training and a test split, each in one of two kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch

from disttrain.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class MemorySplit:
    """A split that is held as one tensor, for data sets up to a few GiB.

    `images`: (N, C, H, W) uint8, or float32. `labels`: (N,) int64, below len(classes); or (N, len(classes)) float32 in
    0..1, probabilities or zeros and ones. `mean`, `std`: one number per channel, for bytes as pixels in 0..1; None for
    floats, which are used as they are, whatever was given. Raises ConfigurationError if they do not fit together.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ConfigurationError(
                f"images must be (N, C, H, W) uint8 or float32, not {tuple(self.images.shape)} {self.images.dtype}."
            )
        num_images, num_classes = len(self.images), len(self.classes)
        kind = (self.labels.dtype, tuple(self.labels.shape))
        if kind not in ((torch.int64, (num_images,)), (torch.float32, (num_images, num_classes))):
            raise ConfigurationError(
                f"labels must be ({num_images},) int64, one per image, or ({num_images}, {num_classes}) float32, a "
                f"number for each class, not {kind[1]} of {kind[0]}."
            )
        if len(self.images) == 0:
            raise ConfigurationError("the data set is empty.")
        if self.labels.ndim == 2:
            wrong = ((self.labels >= 0) & (self.labels <= 1)).all(1).logical_not().nonzero()
            if len(wrong):
                raise ConfigurationError(f"label {int(wrong[0])} holds a number outside 0..1.")
        else:
            lowest, highest = int(self.labels.min()), int(self.labels.max())
            if lowest < 0 or highest >= num_classes:
                raise ConfigurationError(
                    f"label {lowest if lowest < 0 else highest} is outside 0..{num_classes - 1}, the {num_classes} "
                    "classes."
                )
        _settle_statistics(self)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or float32."""
        return self.images.dtype

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width


@dataclass(frozen=True, eq=False)
class StreamSplit:
    """A split whose samples are read one by one, in DataLoader workers, when they are needed.

    `dataset`: map-style, of (image, label) with image (C, H, W) uint8, or float32, all of one type and shape, and label
    a whole number, or (len(classes),) float32. `mean`, `std`: as in MemorySplit. `name` is for messages.
    """

    dataset: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ConfigurationError("the data set is empty.")
        if self.dtype not in (torch.uint8, torch.float32):
            raise ConfigurationError(
                f"the images{f' of {self.name}' if self.name else ''} must be uint8 or float32, not {self.dtype}."
            )
        _settle_statistics(self)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image; every other must have the same."""
        return self._first[0]

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or float32: that of the first image; every other must have the same."""
        return self._first[1]

    @cached_property
    def _first(self) -> tuple[tuple[int, int, int], torch.dtype]:
        image = self.dataset[0][0]
        channels, height, width = image.shape
        return (channels, height, width), image.dtype


Split: TypeAlias = MemorySplit | StreamSplit


@dataclass(frozen=True)
class SplitOutline:
    """Everything about a training set of images but its samples: what a checkpoint holds of it. See StreamSplit."""

    classes: tuple[str, ...]
    sample_shape: tuple[int, int, int]
    dtype: torch.dtype
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True, eq=False)
class SampleSet:
    """A split whose samples are whatever its task's `collate` takes.

    `dataset` is a map-style data set of them with a length, `name` what messages call it. `facts`, as JSON can hold
    them, are what a task and a model may need to know (`vocab_size`, names of classes); a checkpoint holds them.
    `in_memory` says that a sample costs next to nothing to read, so that DataLoader workers would only be in the way.
    """

    dataset: Any
    name: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class SampleSets:
    """A data set of samples of any kind: what is learned from, and what is held out.

    Raises ConfigurationError if one of the two is empty.
    """

    train: SampleSet
    test: SampleSet

    def __post_init__(self) -> None:
        for split, name in ((self.train, "the training set"), (self.test, "the test set")):
            if len(split) == 0:
                raise ConfigurationError(f"{split.name or name} is empty.")


@dataclass(frozen=True)
class Datasets:
    """A data set: what is learned from, and what is held out. Raises ConfigurationError if the two do not match."""

    train: Split
    test: Split

    def __post_init__(self) -> None:
        if self.train.sample_shape != self.test.sample_shape:
            raise ConfigurationError(
                f"training images are {self.train.sample_shape} (channels, height, width) and test images "
                f"{self.test.sample_shape}; make them the same."
            )
        if self.train.classes != self.test.classes:
            raise ConfigurationError(
                f"the training set has {len(self.train.classes)} classes and the test set {len(self.test.classes)}, "
                "or their names or order differ; both need the same."
            )
        if self.train.dtype != self.test.dtype:
            raise ConfigurationError(
                f"training images are {self.train.dtype} and test images {self.test.dtype}; have both sets prepare "
                "their images in the same way."
            )
        if (self.train.mean, self.train.std) != (self.test.mean, self.test.std):
            raise ConfigurationError(
                f"training images are normalised by mean {self.train.mean} and std {self.train.std}, and test images "
                f"by {self.test.mean} and {self.test.std}; both need the same."
            )


def _settle_statistics(split: Split) -> None:
    """Take `mean` and `std` away from a split of floats: nothing is done to those. Raises ConfigurationError."""
    if split.dtype != torch.uint8:
        for name in ("mean", "std"):
            object.__setattr__(split, name, None)  # the split is frozen
        return
    mean, std, num_channels = split.mean, split.std, split.sample_shape[0]
    if mean is None or std is None:
        raise ConfigurationError("images of bytes need a mean and a std, one number for each channel.")
    if len(mean) != num_channels or len(std) != num_channels:
        raise ConfigurationError(
            f"data.mean and data.std: {len(mean)} and {len(std)} numbers for images of {num_channels} channels; "
            "give one for each channel."
        )
    if min(std) <= 0:
        raise ConfigurationError("data.std: every number must be above 0.")
