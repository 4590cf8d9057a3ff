"""How batches of samples are fetched from a split: from memory by index, in this process, or by DataLoader workers."""

from __future__ import annotations

import atexit
import io
import pickle
import signal
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from disttrain.data.batching import Batching, Fetched, ImageSource, SampleSource, Source
from disttrain.data.dataset import MemorySplit, SampleSet, Split, StreamSplit
from disttrain.data.pytree import to_device
from disttrain.distributed import later
from disttrain.errors import ConfigurationError, DisttrainError, brief
from disttrain.recipe import DataRecipe

_GRACE_S = 60
"""How long a DataLoader worker continues after a SIGTERM: enough for its parent's step and checkpoint."""


class Reader(Protocol):
    """Fetches batches, on the device; of images, raw ones (b, C, H, W) and labels (b,) int64."""

    place: torch.device
    """Where the numbers of the samples are best; the CPU will do."""

    def read(self, batches: Iterable[torch.Tensor], seed: int) -> Iterator[Fetched]:
        """The samples of each of `batches` (b,) int64, in turn.

        Random transforms inside a user's data set draw numbers that depend on (seed, sample) alone.
        """
        ...

    def take(self, samples: torch.Tensor, seed: int) -> Fetched:
        """One batch as `read` gives it, fetched in this process whatever else is being read."""
        ...

    def close(self) -> None:
        """Dismiss the workers, if there are any; reading again hires new ones."""
        ...


def open_reader(split: Split | SampleSet, device: torch.device, data: DataRecipe, task: Batching) -> Reader:
    """The reader for the split's kind. `task` collates samples that are not images."""
    if isinstance(split, MemorySplit):
        return MemoryReader(split, device)
    if isinstance(split, StreamSplit):
        return StreamReader(ImageSource(split), device, data.workers)
    return StreamReader(SampleSource(split, task), device, data.workers if _is_streamed(split, data) else 0)


def _is_streamed(split: SampleSet, data: DataRecipe) -> bool:
    """Whether DataLoader workers are worth their start: not for samples that are in memory already."""
    if data.layout != "auto":
        return data.layout == "stream"
    return not (split.in_memory or isinstance(split.dataset, list | tuple | TensorDataset))


class MemoryReader:
    """Picks samples from the split's one tensor, which moves to a GPU for good if it fits in a quarter of its memory.

    Otherwise the bytes go over batch by batch, from pinned memory, while the GPU computes.
    """

    def __init__(self, split: MemorySplit, device: torch.device) -> None:
        resident = later.is_asynchronous(device) and _fits(split.images.nbytes, device)
        home = device if resident else torch.device("cpu")
        self._images, self._labels, self._device = split.images.to(home), split.labels.to(home), device
        self.place = home

    def read(self, batches: Iterable[torch.Tensor], seed: int) -> Iterator[Fetched]:
        """See `Reader.read`."""
        for indices in batches:
            yield self.take(indices, seed)

    def take(self, samples: torch.Tensor, seed: int) -> Fetched:
        """See `Reader.take`."""
        samples = samples.to(self._images.device, non_blocking=True)
        return Fetched((self._chosen(self._images, samples), self._chosen(self._labels, samples)), samples.numel())

    def close(self) -> None:
        """See `Reader.close`."""

    def _chosen(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if values.device == self._device or self._device.type != "cuda":
            return values.index_select(0, indices).to(self._device)
        pinned = torch.empty((len(indices), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
        return torch.index_select(values, 0, indices, out=pinned).to(self._device, non_blocking=True)


def _fits(num_bytes: int, device: torch.device) -> bool:
    return device.type != "cuda" or num_bytes <= torch.cuda.mem_get_info(device)[0] // 4


class StreamReader:
    """Reads samples in DataLoader workers that stay from epoch to epoch, or with none in this process."""

    def __init__(self, source: Source, device: torch.device, workers: int) -> None:
        self.num_workers = workers
        self._plan = _Plan()
        self._source, self._device, self.place = source, device, torch.device("cpu")
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(source),
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

    def read(self, batches: Iterable[torch.Tensor], seed: int) -> Iterator[Fetched]:
        """See `Reader.read`. Raises ConfigurationError for a sample that cannot be read or does not fit."""
        self._plan.batches, self._plan.seed = batches, seed
        try:
            for fetched in self._loader:
                if isinstance(fetched, DisttrainError):
                    raise fetched
                yield self._moved(fetched)
        except Exception:
            self.close()
            raise

    def take(self, samples: torch.Tensor, seed: int) -> Fetched:
        """See `Reader.take`."""
        return self._moved(self._source.fetch(seed, samples.tolist()))

    def _moved(self, fetched: Fetched) -> Fetched:
        return Fetched(to_device(fetched.data, self._device), fetched.weight)

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

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitems__(self, request: tuple[int, list[int]]) -> Fetched | DisttrainError:
        try:
            fetched = self._source.fetch(*request)
            if get_worker_info() is not None:
                _check_can_be_sent(fetched)
        except DisttrainError as error:
            return error
        return fetched


class _Rehearsal(ForkingPickler):
    """Pickles all of a batch but its tensors and arrays, which would be copied."""

    def persistent_id(self, value: Any) -> str | None:
        """What is written in place of `value`. Raises ConfigurationError for a tensor that cannot be sent."""
        if isinstance(value, torch.Tensor):
            if value.requires_grad and not value.is_leaf:
                raise ConfigurationError(
                    "the data set or the task's collate computes a tensor that has a gradient, which cannot be sent "
                    "from the process that reads data: compute it under torch.no_grad(), or set data.workers = 0."
                )
            return "tensor"
        return "array" if isinstance(value, np.ndarray) and value.dtype != object else None


def _check_can_be_sent(fetched: Fetched) -> None:
    """Raise ConfigurationError for a batch that a worker cannot send: its parent would wait for it without end."""
    try:
        _Rehearsal(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(fetched)
    except DisttrainError:
        raise
    except Exception as error:  # a user's object may raise anything
        raise ConfigurationError(
            f"a batch cannot be sent from the process that reads data: {type(error).__name__}: {brief(error)}. Have "
            "the task's collate return tensors, arrays, numbers and text in tuples, lists and dicts, or set "
            "data.workers = 0."
        ) from error


def read_samples(split: StreamSplit, seed: int, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples as `StreamReader.read` gives them, read in this process: images (b, C, H, W) and labels (b,).

    Raises ConfigurationError for a sample that cannot be read or does not fit.
    """
    images, labels = ImageSource(split).fetch(seed, indices).data
    return images, labels


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a job; readers continue until their parent has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Not ignored: it is also how a parent that fails gets rid of its workers, and it waits until they are gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))


def _dismiss(loader: DataLoader[Any] | None) -> None:
    """Let the workers of a loader go by their own door.

    DataLoader does so when it is collected, but where an error's traceback kept it alive that is too late: its queues
    may be gone, or `multiprocessing` has sent SIGTERM, and it waits for nothing.
    """
    iterator = getattr(loader, "_iterator", None)
    if loader is not None and iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None
