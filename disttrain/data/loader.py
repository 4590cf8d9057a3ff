"""Batches for training and evaluation: fetched, and prepared by the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch

from disttrain import rng
from disttrain.data.batching import Batching, Fetched, prepared_by
from disttrain.data.bunches import as_on_its_own, in_bunches, samples_at_once
from disttrain.data.dataset import SampleSet, Split
from disttrain.data.reader import StreamReader, open_reader
from disttrain.data.sampler import StepSampler
from disttrain.distributed import later
from disttrain.distributed.collectives import sum_ahead
from disttrain.recipe import DataRecipe


@dataclass(frozen=True, slots=True)
class Batch:
    """What one backward pass takes.

    `data` is what the task's `collate` and `prepare` made of its samples, on the device. `weight` is the number of
    items in it, of which the task's loss is the sum: its samples, or what `Task.weight` counts. Where this worker's
    share is empty, `is_filler`: it then holds a sample or more of the step, so that the worker can take part in the
    collectives, and weighs nothing. `slice_index` is the piece of the step's global batch that it belongs to;
    `opens_slice` and `closes_slice` mark the first and the last batch of one. `samples`: (b,) int64, where its samples
    are in the training set.
    """

    data: Any
    samples: torch.Tensor
    weight: int
    is_filler: bool
    slice_index: int
    opens_slice: bool
    closes_slice: bool


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This worker's slices of a step's global batch, each in `accumulate` parts.

    `global_size` counts the samples of all workers' parts, `global_weight` their items, of which there may be none.
    """

    step_in_epoch: int
    parts: list[Batch]
    global_size: int
    global_weight: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A batch before it is fetched: which samples of the split, (b,) int64; the rest is as in `Batch`."""

    samples: torch.Tensor
    is_filler: bool
    slice_index: int
    opens_slice: bool
    closes_slice: bool


class Loader:
    """The batches of a training epoch, from any step on.

    Each step's global batch is cut into `num_slices` slices, and each of those into `accumulate` parts. This worker
    serves `slices`: by default one of as many as there are workers. A part without samples is left out, or with
    `fills_empty` holds a sample that weighs nothing, so that all workers have equally many parts. With `passes_of`, the
    slices of each worker, such parts come before those of a slice and belong to none: then every worker has the same
    number of parts, and each slice ends with the same one on all. What is drawn in augmentation is a function of
    (seed, epoch, sample).

    With `weighs`, the task counts items of its own: then the workers agree on a step's global weight while the step
    before is computed, and each must take every step of the epoch.
    """

    def __init__(
        self,
        split: Split | SampleSet,
        sampler: StepSampler,
        data: DataRecipe,
        task: Batching,
        *,
        accumulate: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        slices: Sequence[int] | None = None,
        num_slices: int | None = None,
        fills_empty: bool = True,
        passes_of: Sequence[Sequence[int]] = (),
        weighs: bool = False,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._sampler, self._task, self._accumulate, self._seed = sampler, task, accumulate, seed
        self._slices = [sampler.rank] if slices is None else slices
        self._num_slices = num_slices or sampler.num_replicas
        self._fills_empty, self._passes_of, self._weighs = fills_empty, passes_of, weighs
        self._reader = open_reader(split, self._device, data, task)
        self._bunch_size = samples_at_once(split, task, self._device, self._reader.place)

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._sampler.steps_per_epoch

    def close(self) -> None:
        """Dismiss the DataLoader workers; they leave by themselves at the end of the process."""
        self._reader.close()

    @property
    def streams(self) -> bool:
        """Whether processes of their own read ahead."""
        return isinstance(self._reader, StreamReader) and self._reader.num_workers > 0

    def deal(self, rank: int, size: int, slices: Sequence[int]) -> None:
        """Serve other slices, for another number of workers, from the next `epoch` on."""
        self._sampler.rank, self._sampler.num_replicas, self._slices = rank, size, slices

    def epoch(self, epoch: int, start_step: int = 0, end_step: int | None = None) -> Iterator[StepBatch]:
        """The steps of `epoch` from `start_step` on, up to `end_step`, which is not one of them, or to the last.

        No sample of later steps is read. Raises ConfigurationError for a sample that cannot be read.
        """
        steps = self._steps(epoch, range(start_step, len(self) if end_step is None else min(end_step, len(self))))
        return _one_ahead(steps, self._sampler.num_replicas) if self._weighs else steps

    def samples(self, epoch: int, samples: torch.Tensor) -> Any:
        """These samples of the split, (b,) int64, as they come in this epoch, in one batch; read in this process."""
        return self.fetched(epoch, samples).data

    def sizes(self, *, of_all_slices: bool = False) -> list[int]:
        """How many samples this worker's batches have, the largest first: those of whole steps and of the last one.

        `of_all_slices`: those of the other workers, too, whose slices it may have to serve.
        """
        steps = (0, len(self) - 1)
        slices: Sequence[int] = range(self._num_slices) if of_all_slices else ()
        mine = [piece for step in steps for piece in self._pieces(0, step)]
        others = [piece for step in steps for slice_index in slices for piece in self._cut(0, step, slice_index)]
        return sorted({len(piece.samples) for piece in (*mine, *others)}, reverse=True)

    def fetched(self, epoch: int, samples: torch.Tensor, *, training: bool = True) -> Fetched:
        """As `samples`, with the batch's weight; without `training` prepared as for an evaluation."""
        fetched = self._reader.take(samples, rng.derive(self._seed, epoch))
        return Fetched(self._prepared(fetched.data, epoch, samples, training=training), fetched.weight)

    def parts(self, epoch: int, step: int, slice_index: int, accumulate: int | None = None) -> list[Batch]:
        """One slice of a step, as the worker that serves it has it; read in this process.

        `accumulate`: in so many parts, in place of as many as in training.
        """
        seed = rng.derive(self._seed, epoch)
        pieces = self._cut(epoch, step, slice_index, accumulate)
        return [_batch(piece, self._ready(epoch, piece, self._reader.take(piece.samples, seed))) for piece in pieces]

    def _steps(self, epoch: int, steps: range) -> Iterator[StepBatch]:
        plan, ahead = tee(self._pieces(epoch, step) for step in steps)
        each = (piece for pieces in ahead for piece in pieces)
        ready = self._in_bunches(epoch, each) if self._bunch_size else self._one_by_one(epoch, each)
        for step, pieces in zip(steps, plan, strict=True):
            size = self._sampler.global_size(step)
            # No name keeps a batch while the next one is made, which then has its memory, warm in the caches.
            yield StepBatch(step, [_batch(piece, next(ready)) for piece in pieces], size, size)

    def _one_by_one(self, epoch: int, pieces: Iterator[_Piece]) -> Iterator[Fetched]:
        plan, ahead = tee(pieces)
        # A stream's workers read ahead of what is handed out.
        requests = (self._there(epoch, piece.samples, self._reader.place) for piece in ahead)
        fetched = self._reader.read(requests, rng.derive(self._seed, epoch))
        for piece in plan:
            yield self._ready(epoch, piece, next(fetched))

    def _in_bunches(self, epoch: int, pieces: Iterator[_Piece]) -> Iterator[Fetched]:
        """As `_one_by_one`, with one call of each kernel for several batches, which are views of one tensor."""
        for bunch in in_bunches(pieces, self._bunch_size, lambda piece: len(piece.samples)):
            yield from self._bunch(epoch, [piece.samples for piece in bunch])

    def _bunch(self, epoch: int, batches: list[torch.Tensor]) -> Iterator[Fetched]:
        # The device has the epoch's order already, so this copies nothing to it.
        samples = torch.cat([self._there(epoch, batch, self._device) for batch in batches])
        draw = rng.Draw(self._seed, epoch, samples, self._device)
        data = self._reader.take(samples, rng.derive(self._seed, epoch)).data
        sizes = [len(batch) for batch in batches]
        split = [tensor.split(sizes) for tensor in prepared_by(draw, self._task, data, samples, training=True)]
        del data
        for *parts, size in zip(*split, sizes, strict=True):
            yield Fetched(tuple(map(as_on_its_own, parts)), size)

    def _pieces(self, epoch: int, step: int) -> list[_Piece]:
        if self._passes_of:
            return self._paced(epoch, step)
        return [piece for slice_index in self._slices for piece in self._cut(epoch, step, slice_index)]

    def _cut(self, epoch: int, step: int, slice_index: int, accumulate: int | None = None) -> list[_Piece]:
        pieces, accumulate = [], accumulate or self._accumulate
        whole = self._sampler.indices(epoch, step, slice_index, self._num_slices)
        cut = [whole] if accumulate == 1 else whole.tensor_split(accumulate)
        cut = [part for part in cut if self._fills_empty or part.numel()]
        for number, samples in enumerate(cut, start=1):
            is_filler = not samples.numel()
            if is_filler:
                samples = self._sampler.indices(epoch, step, 0, 1)[:1]
            pieces.append(_Piece(samples, is_filler, slice_index, number == 1, number == len(cut)))
        return pieces

    def _paced(self, epoch: int, step: int) -> list[_Piece]:
        """As `_pieces`, in rounds: in each, every worker has one slice or none, and as many parts as the others."""
        # The first part of all: a model may not be able to compute a single sample, as those with BatchNorm.
        filler = self._sampler.indices(epoch, step, 0, self._num_slices).tensor_split(self._accumulate)[0]
        largest = -(-self._sampler.global_size(step) // self._num_slices)
        num_parts, num_rounds = min(self._accumulate, largest), max(map(len, self._passes_of))
        pieces = []
        for slice_index in [*self._slices, *[None] * (num_rounds - len(self._slices))]:
            cut: Sequence[torch.Tensor] = ()
            if slice_index is not None:
                whole = self._sampler.indices(epoch, step, slice_index, self._num_slices)
                cut = [part for part in whole.tensor_split(self._accumulate) if len(part)]
            for number in range(num_parts):
                real, is_last = number - (num_parts - len(cut)), number == num_parts - 1
                if real < 0:
                    pieces.append(_Piece(filler, True, -1, False, is_last))
                else:
                    pieces.append(_Piece(cut[real], False, slice_index or 0, real == 0, is_last))
        return pieces

    def _ready(self, epoch: int, piece: _Piece, fetched: Fetched) -> Fetched:
        return Fetched(self._prepared(fetched.data, epoch, piece.samples), fetched.weight)

    def _prepared(self, data: Any, epoch: int, samples: torch.Tensor, *, training: bool = True) -> Any:
        draw = rng.Draw(self._seed, epoch, self._there(epoch, samples, self._device), self._device)
        return prepared_by(draw, self._task, data, samples, training=training)

    def _there(self, epoch: int, samples: torch.Tensor, place: torch.device) -> torch.Tensor:
        """The samples' numbers at this place: nothing is sent in a step to a device that one would wait for."""
        return self._sampler.on(place, epoch, samples) if later.is_asynchronous(place) else samples


def _batch(piece: _Piece, ready: Fetched) -> Batch:
    weight = 0 if piece.is_filler else ready.weight
    return Batch(
        ready.data, piece.samples, weight, piece.is_filler, piece.slice_index, piece.opens_slice, piece.closes_slice
    )


def _one_ahead(steps: Iterator[StepBatch], num_workers: int) -> Iterator[StepBatch]:
    """Each step with its global weight, which travels while the step before is computed."""
    waiting: Callable[[], StepBatch] | None = None
    for step in steps:
        coming = _weighed(step, num_workers)
        if waiting is not None:
            yield waiting()
        waiting = coming
    if waiting is not None:
        yield waiting()


def _weighed(step: StepBatch, num_workers: int) -> Callable[[], StepBatch]:
    total = sum_ahead(sum(part.weight for part in step.parts), num_workers)
    return lambda: StepBatch(step.step_in_epoch, step.parts, step.global_size, total())
