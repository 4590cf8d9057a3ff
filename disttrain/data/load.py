"""The data set that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from disttrain.data.dataset import Datasets, MemorySplit, SampleSet, SampleSets, Split, StreamSplit
from disttrain.data.digest import Digest, digest_of
from disttrain.data.sources.custom import load_callable
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe


def load_datasets(
    data: DataRecipe,
    world: World,
    first: Callable[[], AbstractContextManager[None]],
    *,
    images: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Datasets | SampleSets:
    """The data set that `data.dataset` names, normalised and laid out as the recipe says.

    `images` says whether the task takes a user's own sets for sets of images and labels; `facts` are those of the set
    that was trained on, for an evaluation on another. `first` lets one worker of
    each machine through its block before the others: that one downloads and converts, and the others then map what they
    find. Raises ConfigurationError, for the recipe, the data or the network.
    """
    with first():
        try:
            datasets = _load(data, images, facts)
        except OSError as error:
            raise ConfigurationError(f"data.root: {data.root} on {world.host} cannot be read: {error}.") from error
    if isinstance(datasets, SampleSets):
        return datasets
    return Datasets(_as_the_recipe_says(datasets.train, data), _as_the_recipe_says(datasets.test, data))


def _load(data: DataRecipe, images: bool, facts: Mapping[str, Any] | None) -> Datasets | SampleSets:
    # Imported where they are needed: torchvision and scikit-learn take seconds.
    if ":" in data.dataset:
        return load_callable(data, images=images)
    if data.dataset == "folder":
        from disttrain.data.sources.folder import load_folder

        return load_folder(data)
    if data.image_size is not None:
        raise ConfigurationError(
            f"data.image_size: only for dataset 'folder', and this is {data.dataset!r}; leave it out."
        )
    if data.dataset == "digits":
        from disttrain.data.sources.digits import load_digits_split

        return load_digits_split()
    if data.dataset == "table":
        from disttrain.data.sources.tabular import load_table

        return load_table(data, facts)
    if data.dataset == "text":
        from disttrain.data.sources.text import load_text

        return load_text(data, facts)
    if data.dataset == "synthetic":
        from disttrain.data.sources.synthetic import load_synthetic

        return load_synthetic(data)
    if data.dataset in ("cifar10", "cifar100"):
        from torchvision.datasets import CIFAR10, CIFAR100

        from disttrain.data.sources.cifar import load_cifar

        return load_cifar(data, CIFAR10 if data.dataset == "cifar10" else CIFAR100)
    raise ConfigurationError(f"data.dataset: {data.dataset!r} is not a known data set.")


@dataclass(frozen=True)
class _Samples:
    """A MemorySplit as a map-style data set."""

    split: MemorySplit

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        label = self.split.labels[index]
        return self.split.images[index], label if label.ndim else int(label)

    def training_digest(self) -> Digest:
        """See `disttrain.data.digest`."""
        return digest_of(self.split)


def as_samples(split: Split, name: str) -> SampleSet:
    """A split of images for a task that makes its own batches: samples are (image (C, H, W), label).

    Its facts are `classes` and `sample_shape`, and for bytes `mean` and `std`.
    """
    facts: dict[str, Any] = {"classes": list(split.classes), "sample_shape": list(split.sample_shape)}
    if split.mean is not None and split.std is not None:
        facts |= {"mean": list(split.mean), "std": list(split.std)}
    if isinstance(split, MemorySplit):
        return SampleSet(_Samples(split), name, facts, in_memory=True)
    return SampleSet(split.dataset, split.name or name, facts)


def _as_the_recipe_says(split: Split, data: DataRecipe) -> Split:
    if isinstance(split, MemorySplit) and data.layout == "stream":
        split = StreamSplit(_Samples(split), split.classes, split.mean, split.std)
    if data.mean is not None and data.std is not None:
        split = replace(split, mean=tuple(data.mean), std=tuple(data.std))
    return split
