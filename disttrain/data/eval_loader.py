"""Batches for evaluation: the whole set once, shared among the workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from disttrain import rng
from disttrain.data.batching import Batching, Fetched, prepared_by
from disttrain.data.dataset import SampleSet, Split
from disttrain.data.reader import open_reader
from disttrain.recipe import DataRecipe


class EvalBatch(NamedTuple):
    """The `number`-th batch of an evaluation: what the task made of the samples, and how many items they hold."""

    number: int
    data: Any
    weight: int


class EvalLoader:
    """A split in its own order, in batches that have the same content and shape at every world size.

    Batch k belongs to worker k % size; the task prepares it as not for training. All workers get equally many: a number
    of num_batches or more is an earlier batch again, for a model with collectives of its own.
    """

    def __init__(
        self,
        split: Split | SampleSet,
        data: DataRecipe,
        task: Batching,
        *,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self._length, self._batch_size, self._rank, self._size = len(split), batch_size, rank, size
        self._task, self._reader = task, open_reader(split, self.device, data, task)

    @property
    def num_batches(self) -> int:
        """How many batches there are, over all workers."""
        return -(-self._length // self._batch_size)

    def close(self) -> None:
        """Dismiss the DataLoader workers; they leave by themselves at the end of the process."""
        self._reader.close()

    def deal(self, rank: int, size: int) -> None:
        """Serve the batches of another place among the workers."""
        self._rank, self._size = rank, size

    def samples(self, samples: torch.Tensor) -> Any:
        """These samples of the split, (b,) int64, in one batch; read in this process."""
        return self.fetched(samples).data

    def fetched(self, samples: torch.Tensor) -> Fetched:
        """As `samples`, with the batch's weight."""
        fetched = self._reader.take(samples, 0)
        return Fetched(self._prepared(fetched.data, samples), fetched.weight)

    def __iter__(self) -> Iterator[EvalBatch]:
        rounds = -(-self.num_batches // self._size)
        mine = range(self._rank, rounds * self._size, self._size)
        places = (self._indices(number % self.num_batches, self._reader.place) for number in mine)
        fetched = self._reader.read(places, seed=0)
        for number, batch in zip(mine, fetched, strict=True):
            samples = self._indices(number % self.num_batches)
            yield EvalBatch(number, self._prepared(batch.data, samples), batch.weight)

    def _prepared(self, data: Any, samples: torch.Tensor) -> Any:
        return prepared_by(rng.Draw(0, 0, samples, self.device), self._task, data, samples, training=False)

    def _indices(self, number: int, place: torch.device | None = None) -> torch.Tensor:
        begin = number * self._batch_size
        return torch.arange(begin, min(begin + self._batch_size, self._length), device=place)
