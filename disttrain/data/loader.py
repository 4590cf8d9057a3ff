"""Batches for training and evaluation: fetched, augmented and normalised as wholes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import tee

import torch

from disttrain import rng
from disttrain.data.augment import CROP_COLUMNS, CUTOUT_COLUMNS, FLIP_COLUMN, NUM_UNIFORM, crop, cutout, flip
from disttrain.data.dataset import Split
from disttrain.data.normalise import normaliser
from disttrain.data.reader import open_reader
from disttrain.data.sampler import StepSampler
from disttrain.recipe import DataRecipe


@dataclass(frozen=True, slots=True)
class Batch:
    """What one backward pass takes.

    `images`: (b, C, H, W) float32 on the device, `labels`: (b,) int64. `weight` is 1.0, or 0.0 where this worker's
    share is empty: then the batch holds one sample of the step, so that the worker can take part in the collectives.
    `slice_index` is the piece of the step's global batch that it belongs to; `opens_slice` and `closes_slice` mark the
    first and the last batch of one. `samples`: (b,) int64, where its samples are in the training set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    weight: float
    slice_index: int
    opens_slice: bool
    closes_slice: bool


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This worker's slices of a step's global batch, each in `accumulate` parts; `global_size` is that of all."""

    step_in_epoch: int
    parts: list[Batch]
    global_size: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A batch before it is fetched: which samples of the split, (b,) int64; the rest is as in `Batch`."""

    samples: torch.Tensor
    weight: float
    slice_index: int
    opens_slice: bool
    closes_slice: bool


class Loader:
    """The batches of a training epoch, from any step on.

    Each step's global batch is cut into `num_slices` slices, and each of those into `accumulate` parts. This worker
    serves `slices`: by default one of as many as there are workers. A part without samples is left out, or with
    `fills_empty` holds a sample that weighs nothing, so that all workers have equally many parts. Augmentation, if
    `training`, is a function of (seed, epoch, sample).
    """

    def __init__(
        self,
        split: Split,
        sampler: StepSampler,
        data: DataRecipe,
        *,
        accumulate: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        training: bool = True,
        slices: Sequence[int] | None = None,
        num_slices: int | None = None,
        fills_empty: bool = True,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._sampler, self._data, self._accumulate, self._seed = sampler, data, accumulate, seed
        self._slices = [sampler.rank] if slices is None else slices
        self._num_slices = num_slices or sampler.num_replicas
        self._fills_empty = fills_empty
        self._reader = open_reader(split, self._device, data.workers)
        self._normalised = normaliser(split.mean, split.std, self._device)
        self._augments = training and bool(data.crop_padding or data.flip or data.cutout)

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._sampler.steps_per_epoch

    def close(self) -> None:
        """Dismiss a stream's DataLoader workers; they leave by themselves at the end of the process."""
        self._reader.close()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """The steps of `epoch` from `start_step` on. Raises ConfigurationError for a sample that cannot be read."""
        plan, ahead = tee(self._pieces(epoch, step) for step in range(start_step, len(self)))
        # A stream's workers read ahead of what is handed out.
        requests = (piece.samples for pieces in ahead for piece in pieces)
        fetched = self._reader.read(requests, rng.derive(self._seed, epoch))
        for step, pieces in enumerate(plan, start=start_step):
            parts = [self._batch(epoch, piece, *next(fetched)) for piece in pieces]
            yield StepBatch(step, parts, self._sampler.global_size(step))

    def _pieces(self, epoch: int, step: int) -> list[_Piece]:
        pieces = []
        for slice_index in self._slices:
            whole = self._sampler.indices(epoch, step, slice_index, self._num_slices)
            cut = [part for part in whole.tensor_split(self._accumulate) if len(part) or self._fills_empty]
            for number, samples in enumerate(cut, start=1):
                weight = 1.0 if len(samples) else 0.0
                if not weight:
                    samples = self._sampler.indices(epoch, step, 0, 1)[:1]
                pieces.append(_Piece(samples, weight, slice_index, number == 1, number == len(cut)))
        return pieces

    def _batch(self, epoch: int, piece: _Piece, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        images = self._prepared(images, epoch, piece.samples)
        return Batch(
            images, labels, piece.samples, piece.weight, piece.slice_index, piece.opens_slice, piece.closes_slice
        )

    def _prepared(self, images: torch.Tensor, epoch: int, samples: torch.Tensor) -> torch.Tensor:
        if not self._augments:
            return self._normalised(images)
        u = rng.uniform(self._seed, epoch, samples, NUM_UNIFORM).to(images.device, non_blocking=True)
        if self._data.crop_padding:
            images = crop(images, self._data.crop_padding, u[:, CROP_COLUMNS])
        if self._data.flip:
            images = flip(images, u[:, FLIP_COLUMN])
        images = self._normalised(images)
        if self._data.cutout:
            images = cutout(images, self._data.cutout, u[:, CUTOUT_COLUMNS])
        return images


class EvalLoader:
    """A split in its own order, in batches that have the same content and shape at every world size.

    Batch k belongs to worker k % size. Iterating yields (k, images, labels), normalised and never augmented. All
    workers get equally many: k >= num_batches is an earlier batch once more, for a model with collectives of its own.
    """

    def __init__(
        self,
        split: Split,
        data: DataRecipe,
        *,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._length, self._batch_size, self._rank, self._size = len(split), batch_size, rank, size
        self._reader = open_reader(split, self._device, data.workers)
        self._normalised = normaliser(split.mean, split.std, self._device)

    @property
    def num_batches(self) -> int:
        """How many batches there are, over all workers."""
        return -(-self._length // self._batch_size)

    def close(self) -> None:
        """Dismiss a stream's DataLoader workers; they leave by themselves at the end of the process."""
        self._reader.close()

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        rounds = -(-self.num_batches // self._size)
        mine = range(self._rank, rounds * self._size, self._size)
        fetched = self._reader.read((self._indices(number % self.num_batches) for number in mine), seed=0)
        for number, (images, labels) in zip(mine, fetched, strict=True):
            yield number, self._normalised(images), labels

    def _indices(self, number: int) -> torch.Tensor:
        return torch.arange(number * self._batch_size, min((number + 1) * self._batch_size, self._length))
