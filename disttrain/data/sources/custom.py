"""Data sets of the user's own: tensors, arrays, map-style data sets, or a callable that makes them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from disttrain.data.dataset import Datasets, MemorySplit, SampleSet, SampleSets, Split, StreamSplit
from disttrain.data.generators import generators_restored
from disttrain.data.sources.classes import class_names, counted_classes
from disttrain.data.sources.pixels import as_tensor, channels_first
from disttrain.errors import ConfigurationError, DisttrainError, NotImagesError, brief, failure_in
from disttrain.recipe import DataRecipe
from disttrain.recipe.names import misfit
from disttrain.recipe.reference import import_callable

_log = logging.getLogger(__name__)


def load_callable(data: DataRecipe, *, images: bool = True) -> Datasets | SampleSets:
    """What `data.dataset`, as package.module:callable, returns for `data.options`.

    That is `Datasets`, `SampleSets`, or (train, test), which are of `images`, or of samples of any kind. Raises
    ConfigurationError if it does not exist, refuses its options, or returns something else, and UserCodeError if it
    fails.
    """
    make = import_callable(data.dataset, "data.dataset")
    with suppress(ValueError):  # a callable without a signature, written in C
        signature = inspect.signature(make)
        try:
            signature.bind(**data.options)
        except TypeError as error:
            known = list(signature.parameters)
            raise ConfigurationError(misfit("data.options", data.dataset, data.options, known, error)) from error
    try:
        made = make(**data.options)
    except DisttrainError:
        raise
    except Exception as error:  # a user's callable may raise anything
        raise failure_in(f"data.dataset = '{data.dataset}'", error) from error
    if isinstance(made, Datasets | SampleSets):
        return made
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ConfigurationError(
            f"data.dataset: {data.dataset} returned a {type(made).__name__}; it should return (train_set, test_set)."
        )
    train_set, test_set = made
    source = f"data.dataset = '{data.dataset}'"
    if not images:
        return as_sample_sets(train_set, test_set, source)
    return as_datasets(train_set, test_set, data, source)


def as_sample_sets(train_set: Any, test_set: Any, source: str = "") -> SampleSets:
    """Two map-style data sets of samples of any kind, or pairs of tensors of as many rows, as one data set.

    What is a SampleSet already stays as it is; else the attribute `facts` of an object, if it has one, becomes the
    set's. `source` names in messages where the two come from. Raises ConfigurationError for anything else.
    """
    of_source = f" of {source}" if source else ""
    return SampleSets(
        _sample_set(train_set, f"the training set{of_source}"), _sample_set(test_set, f"the test set{of_source}")
    )


def _sample_set(samples: Any, name: str) -> SampleSet:
    if isinstance(samples, SampleSet):
        return samples
    if isinstance(samples, tuple) and samples and all(_is_array(part) for part in samples):
        try:
            samples = TensorDataset(*(torch.as_tensor(part) for part in samples))
        except (AssertionError, TypeError) as error:
            raise ConfigurationError(f"{name}: its tensors have different numbers of rows.") from error
    _refuse_other_than_map_style(
        samples, name, "a map-style data set with a length, or tensors with the same number of rows"
    )
    facts = getattr(samples, "facts", {})
    return SampleSet(samples, name, facts if isinstance(facts, Mapping) else {})


def as_datasets(train_set: Any, test_set: Any, data: DataRecipe, source: str = "") -> Datasets:
    """Two objects that `as_split` takes, as one data set; a test set without class names gets the training set's.

    `source` names in messages where the two come from. Raises NotImagesError for what `as_split` refuses.
    """
    of_source = f" of {source}" if source else ""
    try:
        train = as_split(train_set, data, name=f"the training set{of_source}")
        test = as_split(test_set, data, train.classes, name=f"the test set{of_source}")
    except ConfigurationError as error:
        raise NotImagesError(str(error)) from error
    if train.mean is None and data.mean is not None:
        _log.warning("data.mean and data.std are for bytes: the training set gives floats, which are used as they are.")
    with _said_of(source):
        return Datasets(train, test)


def as_split(samples: Any, data: DataRecipe, classes: tuple[str, ...] | None = None, name: str = "") -> Split:
    """A user's object as a split.

    Taken are: MemorySplit and StreamSplit as they are; a pair (images, labels) of tensors or arrays, or a TensorDataset
    of the two, images (N, C, H, W), arrays also (N, H, W, C); and any map-style data set of (image, label) with a
    length, its images tensors (C, H, W), arrays or PIL pictures. `classes` are the names where the object has none in
    an attribute `classes`; without either they are counted. Byte images are normalised by `data.mean` and `data.std`,
    by default to [-1, 1]; floating-point ones are used as they are. Raises ConfigurationError, which calls it by
    `name`, for anything else.
    """
    if isinstance(samples, MemorySplit | StreamSplit):
        return samples
    with _said_of(name):
        names = class_names(samples) or classes
    if isinstance(samples, TensorDataset):
        samples = samples.tensors
    if isinstance(samples, tuple | list) and len(samples) == 2 and all(_is_array(part) for part in samples):
        with _said_of(name):
            return _memory_split(channels_first(samples[0]), torch.as_tensor(samples[1]), names, data, name)
    wanted = "(images, labels), or a map-style data set of (image, label) with a length"
    _refuse_other_than_map_style(samples, name or "the data set", wanted)
    return _stream_split(samples, names, data, name)


def _refuse_other_than_map_style(samples: Any, name: str, wanted: str) -> None:
    if isinstance(samples, IterableDataset):
        raise ConfigurationError(
            f"{name}: a {type(samples).__name__} is an iterable data set, whose samples have no index: a step's share "
            f"for each worker, and where to resume, depend on indices. Give {wanted}."
        )
    if isinstance(samples, DataLoader):
        raise ConfigurationError(
            f"{name}: a DataLoader makes batches, but disttrain makes its own, of data.batch_size samples; give its "
            "data set (loader.dataset)."
        )
    if isinstance(samples, type) or inspect.isroutine(samples):
        raise ConfigurationError(f"{name}: {samples.__qualname__} makes a data set, but is not one; call it.")
    is_map_style = isinstance(samples, Sized) and hasattr(samples, "__getitem__") and not _is_array(samples)
    if not is_map_style or isinstance(samples, str | bytes | Mapping):
        raise ConfigurationError(f"{name}: a {type(samples).__name__} is not a data set; give {wanted}.")


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Begin the message of a ConfigurationError with `what` it is about."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{what}: {error}" if what else str(error)) from error


@dataclass(frozen=True)
class _AsTensors:
    """A user's data set with its images as tensors."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        name = f"sample {index} of {self.name or 'the data set'}"
        try:
            sample = self.dataset[index]
        except DisttrainError:
            raise
        except Exception as error:  # a user's data set may raise anything
            raise failure_in(name, error) from error
        try:
            image, label = sample
            return as_tensor(image), _as_label(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"{name} is not a pair (image, label): {brief(error)}.") from error


def _as_label(label: Any) -> int | torch.Tensor:
    """A whole number, or of several numbers, one for each class, (K,) float32. Raises ValueError or TypeError."""
    several = torch.as_tensor(label) if isinstance(label, list | tuple | np.ndarray) else label
    if isinstance(several, torch.Tensor) and several.ndim == 1 and len(several) > 1:
        return several.to(torch.float32)
    number = int(label)
    if number != label:
        raise ValueError(f"the label {label!r} is not a whole number")
    return number


def _memory_split(
    images: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...] | None, data: DataRecipe, name: str
) -> MemorySplit:
    if images.is_floating_point():
        images = images.float()
    if labels.ndim == 2 and not labels.is_complex():
        labels = labels.float()
        classes = classes or _numbered(labels.shape[1])
    elif not labels.is_floating_point() and not labels.is_complex():
        labels = labels.long()
    if classes is None:
        classes = counted_classes(torch.unique(labels.long()).tolist(), name or "the data set")
    channels = images.shape[1] if images.ndim == 4 else 1
    return MemorySplit(images.contiguous().cpu(), labels.contiguous().cpu(), classes, *_statistics(data, channels))


def _stream_split(dataset: Any, classes: tuple[str, ...] | None, data: DataRecipe, name: str) -> StreamSplit:
    if len(dataset) == 0:
        raise ConfigurationError(f"{name or 'the data set'} is empty.")
    wrapped = _AsTensors(dataset, name)
    image, label = wrapped[0]
    if classes is None and isinstance(label, torch.Tensor):
        classes = _numbered(len(label))
    if classes is None:
        with _said_of(name):
            classes = counted_classes(_labels(wrapped), name or "the data set")
    return StreamSplit(wrapped, classes, *_statistics(data, image.shape[0]), name)


def _numbered(num_classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(num_classes)))


def _labels(samples: _AsTensors) -> Iterator[int]:
    """Every label of a set that does not name its classes, for which each sample is read."""
    if not isinstance(samples.dataset, list | tuple):
        _log.warning(
            "%s does not name its classes: each of its %s samples is read to count them. An attribute 'classes', a "
            "list of names, saves that.",
            samples.name or "the data set",
            f"{len(samples):,}",
        )
    with generators_restored():
        yield from (int(samples[index][1]) for index in range(len(samples)))


def _statistics(data: DataRecipe, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if data.mean is None or data.std is None:
        return (0.5,) * channels, (0.5,) * channels
    return tuple(data.mean), tuple(data.std)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)
