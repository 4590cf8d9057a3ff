"""What the classes of a user's own data set are called."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sized
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from disttrain.errors import ConfigurationError, brief

_log = logging.getLogger(__name__)
_MOST = 2**20


def class_names(samples: Any) -> tuple[str, ...] | None:
    """The names in an attribute `classes`, also of what a Subset or a ConcatDataset is made of, where all have them.

    Raises ConfigurationError if the attribute is something else than names.
    """
    names = getattr(samples, "classes", None)
    if names is None and isinstance(samples, Subset):
        return class_names(samples.dataset)
    if names is None and isinstance(samples, ConcatDataset):
        parts = {class_names(part) for part in samples.datasets}
        return parts.pop() if len(parts) == 1 else None
    if names is None:
        return None
    if isinstance(names, str) or not (isinstance(names, Iterable) and isinstance(names, Sized)):
        raise ConfigurationError(f"its attribute 'classes' is {brief(repr(names))}, not a list of names.")
    return tuple(str(name) for name in names) or None


def counted_classes(labels: Iterable[int], name: str) -> tuple[str, ...]:
    """Numbers from 0 up as the names of classes, as many as the labels of the set `name` need; a line says how many.

    Raises ConfigurationError for labels that cannot be numbers of classes.
    """
    found = sorted(set(labels))
    if not found:
        return ()
    if found[-1] >= _MOST:
        raise ConfigurationError(f"label {found[-1]} is not a valid class number: count classes from 0.")
    num_classes = found[-1] + 1
    missing = f"; only {len(found)} of them occur" if found[0] >= 0 and len(found) < num_classes else ""
    _log.info("%d classes, counted from the labels %d to %d of %s%s.", num_classes, found[0], found[-1], name, missing)
    return tuple(str(number) for number in range(num_classes))
