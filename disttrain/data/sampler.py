"""Which samples a step takes, and which of them are this worker's."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from disttrain import rng


class StepSampler(DistributedSampler[int]):
    """A DistributedSampler that pads nothing, counts in steps of the global batch, and starts at any of them.

    The order of an epoch's samples is a function of (seed, epoch) alone: `rng.permutation`. Step t takes the t-th slice
    of `batch_size` samples from it, the last step what is left; the workers share each slice in contiguous parts whose
    sizes differ by one at most. So all workers together visit every sample once an epoch, at any world size.

    As with torch's own, call `set_epoch` before iterating; iteration yields this worker's indices of the epoch, one by
    one, from the position on. `dataset` is the data set or its length. Raises ValueError for a size, rank or step that
    cannot be.
    """

    def __init__(
        self, dataset: Sized | int, *, num_replicas: int = 1, rank: int = 0, seed: int = 0, batch_size: int
    ) -> None:
        sized = range(dataset) if isinstance(dataset, int) else dataset
        if len(sized) < 1:
            raise ValueError("the data set is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        super().__init__(cast("Dataset[int]", sized), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.length = len(sized)
        self.steps_per_epoch = -(-self.length // batch_size)
        self.start_step = 0
        self._order: tuple[int, torch.Tensor] | None = None
        self._there: torch.Tensor | None = None  # the same on another device

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.set_position(epoch, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Go to a step of an epoch, at the same cost for every step. `step` may be the end, `steps_per_epoch`."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        self.epoch, self.start_step = epoch, step

    def global_size(self, step: int) -> int:
        """How many samples the step takes, over all workers: `batch_size`, or fewer in the last step."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        return min(self.batch_size, self.length - step * self.batch_size)

    def order(self, epoch: int) -> torch.Tensor:
        """The epoch's samples in order, (N,) int64; computed once an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order, self._there = (epoch, rng.permutation(self.seed, epoch, self.length)), None
        return self._order[1]

    def on(self, device: torch.device, epoch: int, samples: torch.Tensor) -> torch.Tensor:
        """What `indices` gave of this epoch, or a part of it, on another device, where the order is brought once."""
        order = self.order(epoch)
        if samples.untyped_storage().data_ptr() != order.untyped_storage().data_ptr():
            return samples.to(device, non_blocking=True)
        if self._there is None or self._there.device != device:
            self._there = order.to(device)
        return self._there[samples.storage_offset() :][: len(samples)]

    def indices(self, epoch: int, step: int, part: int | None = None, parts: int | None = None) -> torch.Tensor:
        """The samples of `part` of `parts` of the step, (b,) int64: by default this worker's of all workers'.

        The parts follow one another; earlier ones are larger by one where the step does not divide evenly. A part is
        empty where there are more parts than samples. A view of `order`: not to be written to.
        """
        part = self.rank if part is None else part
        parts = self.num_replicas if parts is None else parts
        if not 0 <= part < parts:
            raise ValueError(f"part {part} is outside the {parts} parts")
        size, extra = divmod(self.global_size(step), parts)
        start = step * self.batch_size + part * size + min(part, extra)
        return self.order(epoch)[start : start + size + (part < extra)]

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start_step, self.steps_per_epoch):
            yield from self.indices(self.epoch, step).tolist()

    def __len__(self) -> int:
        """How many of this worker's samples are left from the position to the end of the epoch."""
        remaining = self.steps_per_epoch - self.start_step
        if remaining == 0:
            return 0
        return (remaining - 1) * self._share(self.batch_size) + self._share(self.global_size(self.steps_per_epoch - 1))

    def _share(self, global_size: int) -> int:
        size, extra = divmod(global_size, self.num_replicas)
        return size + (self.rank < extra)
