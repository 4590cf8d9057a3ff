"""What a task decides about batches, and how a split's samples become one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from disttrain import rng
from disttrain.data.dataset import SampleSet, StreamSplit
from disttrain.data.generators import generators_restored, seed_generators
from disttrain.errors import (
    ConfigurationError,
    DisttrainError,
    TaskError,
    brief,
    defined_at,
    failure_in,
    failure_of,
    failures_named,
)

_MOST_ITEMS = 2**48  # the workers add their weights up as int64


class Batching(Protocol):
    """The part of a task that makes batches; see `disttrain.task.Task`."""

    def collate(self, samples: list[Any]) -> Any:
        """A batch of samples, on the CPU."""
        ...

    def weight(self, batch: Any) -> int | None:
        """Over how many items the loss of the batch is a sum; None: over its samples."""
        ...

    def prepare(self, batch: Any, draw: Callable[[int], torch.Tensor], *, training: bool) -> Any:
        """What is done to a batch on the device."""
        ...


class Fetched(NamedTuple):
    """A batch as it was collated, and its weight: how many items it holds."""

    data: Any
    weight: int


class Source(Protocol):
    """Makes a batch of some samples of a split."""

    def fetch(self, seed: int, indices: list[int]) -> Fetched:
        """The batch of these samples, on the CPU. Raises DisttrainError for one that cannot be had."""
        ...


class ImageSource:
    """Samples of a StreamSplit: images (b, C, H, W), and labels (b,) int64 or (b, number of classes) float32."""

    def __init__(self, split: StreamSplit) -> None:
        self._dataset, self._num_classes = split.dataset, len(split.classes)
        self._sample_shape, self._dtype = split.sample_shape, split.dtype
        self._of_set = f" of {split.name}" if split.name else ""

    def fetch(self, seed: int, indices: list[int]) -> Fetched:
        """See `Source.fetch`. Raises ConfigurationError for a sample that does not fit."""
        images, labels = [], []
        with generators_restored():
            for index in indices:
                seed_generators(rng.derive(seed, index))
                try:
                    image, label = self._dataset[index]
                    images.append(self._checked(index, image))
                    labels.append(self._checked_label(index, label))
                except DisttrainError:
                    raise
                except Exception as error:  # a user's data set may raise anything
                    raise failure_in(f"sample {index}{self._of_set}", error) from error
        return Fetched((torch.stack(images), torch.stack(labels)), len(indices))

    def _checked(self, index: int, image: torch.Tensor) -> torch.Tensor:
        if tuple(image.shape) != self._sample_shape:
            raise ConfigurationError(
                f"sample {index}{self._of_set} is {tuple(image.shape)} (channels, height, width) and the first sample "
                f"{self._sample_shape}; bring all to one size."
            )
        if image.dtype != self._dtype:
            raise ConfigurationError(
                f"sample {index}{self._of_set} is {image.dtype} and the first sample {self._dtype}; give all one type."
            )
        return image

    def _checked_label(self, index: int, label: Any) -> torch.Tensor:
        if isinstance(label, torch.Tensor) and label.ndim:
            if label.shape != (self._num_classes,) or not bool(((label >= 0) & (label <= 1)).all()):
                raise ConfigurationError(
                    f"sample {index}{self._of_set} has a label {tuple(label.shape)}: give a number from 0 to 1 for "
                    f"each of the {self._num_classes} classes."
                )
            return label
        if not 0 <= int(label) < self._num_classes:
            raise ConfigurationError(
                f"sample {index}{self._of_set} has label {int(label)}, outside 0..{self._num_classes - 1}."
            )
        return torch.tensor(int(label))


class SampleSource:
    """Samples of any kind, collated and weighed by the task."""

    def __init__(self, split: SampleSet, task: Batching) -> None:
        self._dataset, self._task = split.dataset, task
        self._of_set = f" of {split.name}" if split.name else ""

    def fetch(self, seed: int, indices: list[int]) -> Fetched:
        """See `Source.fetch`. Raises UserCodeError for what the data set or the task raises."""
        samples, name = [], type(self._task).__name__
        with generators_restored():
            for index in indices:
                seed_generators(rng.derive(seed, index))
                try:
                    samples.append(self._dataset[index])
                except DisttrainError:
                    raise
                except Exception as error:  # a user's data set may raise anything
                    raise failure_in(f"sample {index}{self._of_set}", error) from error
            # Masks that are drawn here follow from the samples, too, not from what was collated before.
            seed_generators(rng.derive(seed, *indices))
            of = f"{_first_of(indices)}{self._of_set}"
            try:
                batch = self._task.collate(samples)
            except DisttrainError:
                raise
            except Exception as error:  # and so may a user's task
                raise _uncollated(self._task, of, error) from error
            with failures_named(f"{name}.weight of the batch of {of}"):
                weight = self._task.weight(batch)
        return Fetched(batch, len(indices) if weight is None else checked_weight(weight, f"{name}.weight(batch)"))


def _uncollated(task: Batching, of: str, error: Exception) -> TaskError:
    """Why no batch of these samples could be made, and what the task should do."""
    kind = type(task)
    if (kind.collate.__module__ or "") != "disttrain.task.base":
        return failure_of(f"{kind.__name__} cannot collate {of}", error)
    return TaskError(
        f"{kind.__name__} ({defined_at(kind)}) does not define collate(samples), and torch's default_collate cannot "
        f"make a batch of {of}: {brief(error, 120)}. Define it; pad in it what differs in length."
    )


def prepared(task: Batching, batch: Any, draw: Callable[[int], torch.Tensor], *, training: bool) -> Any:
    """What the task's `prepare` makes of the batch. Raises UserCodeError for what it raises."""
    with failures_named(f"{type(task).__name__}.prepare"):
        return task.prepare(batch, draw, training=training)


def prepared_by(draw: rng.Draw, task: Batching, data: Any, samples: torch.Tensor, *, training: bool) -> Any:
    """What the task makes of a batch of these samples, (b,) int64 on the CPU.

    What it draws from the global generators follows from the samples, too.
    """
    if (type(task).prepare.__module__ or "").startswith("disttrain."):  # ours draw by `draw` alone: time saved
        return task.prepare(data, draw, training=training)
    with generators_restored():
        rng.seed_layers(draw.device, rng.derive(draw.seed, draw.epoch, *samples.tolist()), 0, 0)
        return prepared(task, data, draw, training=training)


def checked_weight(weight: Any, what: str) -> int:
    """The weight as an int. Raises ConfigurationError, naming `what` returned it, unless it is whole and >= 0."""
    try:
        number = operator.index(weight)  # a tensor of one integer counts as one, too
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number <= _MOST_ITEMS or isinstance(weight, bool):
        raise ConfigurationError(
            f"{what} returned {weight!r}: it has to be a whole number of at least 0, the number of items that the loss "
            "is a sum over, or None for the number of samples."
        )
    return number


def _first_of(indices: list[int]) -> str:
    rest = len(indices) - 8
    listed = ", ".join(map(str, indices[:8])) + (f" and {rest} more" if rest > 0 else "")
    return f"sample{'s' if len(indices) > 1 else ''} {listed}"
