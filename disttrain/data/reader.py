"""How batches of samples are fetched from a split: from memory by index, or through DataLoader workers."""

from __future__ import annotations

import atexit
import random
import signal
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from disttrain import rng
from disttrain.data.dataset import MemorySplit, Split, StreamSplit
from disttrain.errors import ConfigurationError, DisttrainError, failure_in

_GRACE_S = 60
"""How long a DataLoader worker goes on after a SIGTERM: enough for the step and the checkpoint that its parent ends."""


class Reader(Protocol):
    """Fetches batches: raw images (b, C, H, W) and labels (b,) int64, on the device."""

    def read(self, batches: Iterable[torch.Tensor], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The samples of each of `batches` (b,) int64, in turn.

        Random transforms inside a user's data set draw numbers that depend on (seed, sample) alone.
        """
        ...

    def close(self) -> None:
        """Dismiss the workers, if there are any; reading again hires new ones."""
        ...


def open_reader(split: Split, device: torch.device, workers: int) -> Reader:
    """The reader for the split's kind; `workers` is the number of DataLoader workers of a stream."""
    if isinstance(split, MemorySplit):
        return MemoryReader(split, device)
    return StreamReader(split, device, workers)


class MemoryReader:
    """Picks samples from the split's one tensor, which moves to a GPU for good if it fits in a quarter of its memory.

    Otherwise the bytes go over batch by batch, from pinned memory, while the GPU computes.
    """

    def __init__(self, split: MemorySplit, device: torch.device) -> None:
        resident = device.type == "cuda" and split.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4
        home = device if resident else torch.device("cpu")
        self._images, self._labels, self._device = split.images.to(home), split.labels.to(home), device

    def read(self, batches: Iterable[torch.Tensor], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Reader.read`."""
        home = self._images.device
        for indices in batches:
            indices = indices.to(home, non_blocking=True)
            yield self._take(self._images, indices), self._take(self._labels, indices)

    def close(self) -> None:
        """See `Reader.close`."""

    def _take(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if values.device == self._device or self._device.type != "cuda":
            return values.index_select(0, indices).to(self._device)
        pinned = torch.empty((len(indices), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
        return torch.index_select(values, 0, indices, out=pinned).to(self._device, non_blocking=True)


class StreamReader:
    """Reads samples in DataLoader workers that stay from epoch to epoch."""

    def __init__(self, split: StreamSplit, device: torch.device, workers: int) -> None:
        self._plan = _Plan()
        self._device = device
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(split),
            batch_sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # DataLoader draws from it; the global one stays as it is
        )
        reference = weakref.ref(self._loader)
        atexit.register(lambda: _dismiss(reference()))

    def read(self, batches: Iterable[torch.Tensor], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Reader.read`. Raises ConfigurationError for a sample that cannot be read or does not fit."""
        self._plan.batches, self._plan.seed = batches, seed
        try:
            for fetched in self._loader:
                if isinstance(fetched, DisttrainError):
                    raise fetched
                images, labels = fetched
                yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """See `Reader.close`."""
        _dismiss(self._loader)


class _Plan:
    """The batch sampler of a DataLoader that lives through many epochs: what it is to fetch next."""

    def __init__(self) -> None:
        self.batches: Iterable[torch.Tensor] = ()
        self.seed = 0

    def __iter__(self) -> Iterator[Any]:
        for indices in self.batches:
            yield self.seed, indices.tolist()  # plain numbers: a view would take the whole epoch's order along


class _Batches(Dataset[Any]):
    """A data set that is asked for whole batches, which DataLoader does through `__getitems__`.

    Why one cannot be had travels as a value, since an error that is raised in a worker arrives as another, without the
    sample's number.
    """

    def __init__(self, split: StreamSplit) -> None:
        self._dataset, self._num_classes = split.dataset, len(split.classes)
        self._sample_shape, self._dtype = split.sample_shape, split.dtype
        self._of_set = f" of {split.name}" if split.name else ""

    def __getitems__(self, request: tuple[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor] | DisttrainError:
        seed, indices = request
        images, labels = [], []
        try:
            with generators_restored():
                for index in indices:
                    _seed_generators(rng.derive(seed, index))
                    image, label = self._dataset[index]
                    images.append(self._checked(index, image, int(label)))
                    labels.append(int(label))
        except DisttrainError as error:
            return error
        except Exception as error:  # a user's data set may raise anything
            return failure_in(f"sample {index}{self._of_set}", error)
        return torch.stack(images), torch.tensor(labels)

    def _checked(self, index: int, image: torch.Tensor, label: int) -> torch.Tensor:
        if tuple(image.shape) != self._sample_shape:
            raise ConfigurationError(
                f"sample {index}{self._of_set} is {tuple(image.shape)} (channels, height, width) and the first sample "
                f"{self._sample_shape}; bring all to one size."
            )
        if image.dtype != self._dtype:
            raise ConfigurationError(
                f"sample {index}{self._of_set} is {image.dtype} and the first sample {self._dtype}; give all one type."
            )
        if not 0 <= label < self._num_classes:
            raise ConfigurationError(
                f"sample {index}{self._of_set} has label {label}, outside 0..{self._num_classes - 1}."
            )
        return image


def read_samples(split: StreamSplit, seed: int, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples as `StreamReader.read` gives them, read in this process: images (b, C, H, W) and labels (b,).

    Raises ConfigurationError for a sample that cannot be read or does not fit.
    """
    fetched = _Batches(split).__getitems__((seed, indices))
    if isinstance(fetched, DisttrainError):
        raise fetched
    return fetched


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a job; readers go on until their parent has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Not ignored: it is also how a parent that fails gets rid of its workers, and it waits until they are gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))


def _dismiss(loader: DataLoader[Any] | None) -> None:
    """Let the workers of a loader go by their own door.

    DataLoader does so when it is collected, but where an error's traceback kept it alive that is too late: its queues
    may be gone, or `multiprocessing` has sent SIGTERM, and it waits in vain.
    """
    iterator = getattr(loader, "_iterator", None)
    if loader is not None and iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the global generators as they were: without DataLoader workers they are the training process's own."""
    python, legacy_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy_numpy)
