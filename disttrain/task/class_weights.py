"""How much each class counts in a training loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from disttrain.data import SplitOutline, labels_of
from disttrain.errors import ConfigurationError

_KEY = "task.options.class_weights"


def checked_class_weights(asked: Sequence[float] | str | None, train_set: Any) -> tuple[float, ...] | None:
    """A number for each class of the set, or None: what was asked for, or what "balanced" comes to.

    That is N / (K * samples of the class), as in scikit-learn, with a mean of 1 over the training samples. Raises
    ConfigurationError for what does not fit the set.
    """
    if asked is None:
        return None
    if isinstance(train_set, SplitOutline):  # what a checkpoint says of a set: nothing is trained on it
        return None
    num_classes = len(train_set.classes)
    if asked == "balanced":
        labels = labels_of(train_set)
        if labels is None:
            raise ConfigurationError(
                f'{_KEY}: "balanced" needs the labels of all training samples, which this set has only one by one. '
                f"Give it an attribute 'targets', a list of them, or give {num_classes} numbers here."
            )
        counts = labels.bincount(minlength=num_classes) if labels.ndim == 1 else labels.double().sum(0)
        return tuple(len(labels) / (num_classes * count) if count else 1.0 for count in counts.tolist())
    numbers = list(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else []
    fit = [isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < math.inf for one in numbers]
    if len(numbers) != num_classes or not all(fit) or not any(numbers):
        raise ConfigurationError(
            f'{_KEY}: {asked!r} is neither "balanced" nor a list of {num_classes} numbers of 0 or more, one for each '
            "class."
        )
    return tuple(map(float, numbers))


@lru_cache(maxsize=16)  # every batch asks, and on a GPU each copy would wait for it
def weights_on(device: torch.device, dtype: torch.dtype, weights: tuple[float, ...]) -> torch.Tensor:
    """The weights as a tensor, (K,): not to be written to."""
    with torch.inference_mode(False):  # whoever asks first; what is made in that mode is refused in training
        return torch.tensor(weights, dtype=dtype, device=device)
