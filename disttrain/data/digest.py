"""What a training set is, in a few bytes: a run that resumes has to find the data that it was trained on."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from disttrain import rng
from disttrain.data.dataset import MemorySplit, SampleSet, Split, StreamSplit
from disttrain.data.generators import generators_restored, seed_generators
from disttrain.data.labels import labels_of
from disttrain.data.reader import read_samples

_MOST_BYTES = 256 * 2**20  # of pixels, a tenth of a second; of a larger set every n-th image is looked at
_NUM_SIZES = 1024  # files of which the size is looked at, beside the names of all
_NUM_READ = 4  # samples of a user's own set


@dataclass(frozen=True)
class Digest:
    """`labels`: of all labels in their order, as far as they are known without reading each sample.

    `contents`: of the samples, "HOW:DIGEST". Only those that were made in one way can be compared. None: unknown.
    """

    labels: str | None = None
    contents: str | None = None


@runtime_checkable
class Digested(Protocol):
    """A data set that describes itself better than its samples do."""

    def training_digest(self) -> Digest:
        """Its digest."""
        ...


def digest_of(split: Split | SampleSet) -> Digest:
    """The digest of a training set, in a fraction of a second for all but huge sets."""
    if isinstance(split, MemorySplit):
        # What a user computed in floating point may have other bits on another machine.
        pixels = f"pixels:{_crc32(split.images):08x}" if split.images.dtype == torch.uint8 else None
        return Digest(_of_labels(split.labels), pixels)
    if isinstance(split.dataset, Digested):
        return split.dataset.training_digest()
    if isinstance(split, SampleSet):
        return Digest(None, _of_some_samples(split))
    labels = labels_of(split)
    if labels is not None:
        return Digest(_of_labels(labels), None)
    return Digest(None, _of_some_labels(split))


def _crc32(images: torch.Tensor) -> int:
    stride = max(1, -(-images.nbytes // _MOST_BYTES))
    found = zlib.crc32(repr((tuple(images.shape), str(images.dtype), stride)).encode())
    chosen = images[::stride]
    for begin in range(0, len(chosen), 256):
        found = zlib.crc32(_bytes_of(chosen[begin : begin + 256]), found)
    return found


def digest_of_files(files: Sequence[tuple[Path, int]]) -> Digest:
    """The digest of files with their labels: the names of all below the folder that they share, the sizes of some."""
    paths = [path for path, _ in files]
    root = os.path.commonpath([paths[0], paths[-1]])  # of the first and of the last class
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path)[len(root) :] + b"\0")
    for path in paths[:: -(-len(paths) // _NUM_SIZES)]:
        digest.update(f"{path.stat().st_size}\0".encode())
    labels = torch.tensor([label for _, label in files])
    return Digest(_sha256(_bytes_of(labels)), f"files:{digest.hexdigest()[:16]}")


def _of_labels(labels: torch.Tensor) -> str | None:
    """Of all labels; None for probabilities, whose last bits may be others on another machine."""
    is_exact = not labels.is_floating_point() or torch.equal(labels, labels.round())
    return _sha256(_bytes_of(labels)) if is_exact else None


def _of_some_labels(split: StreamSplit) -> str | None:
    """Of the labels of a few samples, if they are the same when they are read again."""
    indices = torch.linspace(0, len(split) - 1, min(_NUM_READ, len(split))).long().tolist()
    try:
        first, again = (read_samples(split, 0, indices)[1] for _ in range(2))
    except Exception:  # a user's code; training on the sample reports what is wrong with it
        return None
    return f"labels of {indices}:{_sha256(_bytes_of(first))}" if torch.equal(first, again) else None


def _of_some_samples(split: SampleSet) -> str | None:
    """Of what is exact in a few samples, if it is the same when they are read again."""
    indices = torch.linspace(0, len(split) - 1, min(_NUM_READ, len(split))).long().tolist()
    try:
        with generators_restored():
            first, again = ([_what_is_exact(_read(split, index)) for index in indices] for _ in range(2))
    except Exception:  # a user's code; training on the sample reports what is wrong with it
        return None
    digest = hashlib.sha256(repr(first).encode()).hexdigest()[:16]
    return f"samples {indices}:{digest}" if first == again else None


def _read(split: SampleSet, index: int) -> Any:
    seed_generators(rng.derive(0, index))  # or a set that draws might be taken for steady by chance, and refused later
    return split.dataset[index]


def _what_is_exact(value: Any) -> Any:
    """Numbers, texts and shapes; what is in floating point may have other bits on another machine."""
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, torch.Tensor):
        exact = None if value.is_floating_point() or value.is_complex() else _sha256(_bytes_of(value.cpu()))
        return str(value.dtype), tuple(value.shape), exact
    if isinstance(value, Mapping):
        return {str(key): _what_is_exact(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_what_is_exact(one) for one in value]
    return value if isinstance(value, str | int | bool | bytes) else type(value).__name__


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sha256(raw: memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
