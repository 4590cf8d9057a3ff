"""Random numbers as a pure function of what they are for: nothing to save, nothing to restore.

Every number follows from (seed, epoch), (seed, epoch, sample) or (seed, step, slice), never from what was drawn
before it. So a run that starts again in the middle, or on another number of workers, draws what it would have drawn.
The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_NO_EPOCH = -1


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def derive(*parts: int) -> int:
    """A 63-bit seed that depends on every one of `parts` and on their order."""
    state = 0
    for part in parts:
        state = _mix((state + _GOLDEN + (part & _MASK)) & _MASK)
    return state >> 1


def permutation(seed: int, epoch: int, num_samples: int) -> torch.Tensor:
    """The order of an epoch's samples, (num_samples,) int64: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive(seed, epoch))
    return torch.randperm(num_samples, generator=generator)


def uniform(seed: int, epoch: int, samples: torch.Tensor, num: int) -> torch.Tensor:
    """`num` numbers in [0, 1) for each of `samples` (B,) int64, as (B, num) float32.

    A sample's numbers depend on (seed, epoch, sample) and the column alone, not on the batch it is in. They are
    computed where `samples` is: by integers, and so to the same bits on every device.
    """
    if samples.device.type != "cpu":
        return uniform_there(seed, epoch, samples, num)
    # In NumPy, whose unsigned integers wrap around and shift as the mixing function has it: a third of PyTorch's time.
    rows = samples.to(dtype=torch.int64).numpy().view(np.uint64)[:, None] * np.uint64(_GOLDEN)
    state = rows + np.arange(num, dtype=np.uint64) * np.uint64(_MIX_2) + np.uint64(derive(seed, epoch))
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        state = (state ^ (state >> np.uint64(bits))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def uniform_there(seed: int, epoch: int, samples: torch.Tensor, num: int) -> torch.Tensor:
    """As `uniform`, by PyTorch: where NumPy does not reach."""
    columns = torch.arange(num, dtype=torch.int64, device=samples.device)
    state = samples.to(dtype=torch.int64)[:, None] * _signed(_GOLDEN) + columns[None, :] * _signed(_MIX_2)
    state = state + _signed(derive(seed, epoch))
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        state = (state ^ _shift_right(state, bits)) * _signed(factor)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).to(torch.float32) / (1 << 24)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: PyTorch's `>>` on int64 keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class Draw:
    """Draws numbers for the samples of a batch, (B,) int64 on the CPU or the device, in an epoch, on a device."""

    seed: int
    epoch: int
    samples: torch.Tensor
    device: torch.device

    def __call__(self, num: int) -> torch.Tensor:
        """(B, num) float32 in [0, 1), a function of (seed, epoch, sample) alone."""
        return uniform(self.seed, self.epoch, self.samples, num).to(self.device, non_blocking=True)

    def for_all_epochs(self, num: int) -> torch.Tensor:
        """(B, num) float32 in [0, 1), a function of (seed, sample) alone."""
        return uniform(self.seed, _NO_EPOCH, self.samples, num).to(self.device, non_blocking=True)


def seed_layers(device: torch.device, seed: int, step: int, slice_index: int) -> None:
    """Give dropout and its like their numbers for this step and slice.

    They have no other sources than the global generators: PyTorch's own, and in users' models Python's and NumPy's.
    """
    number = derive(seed, step, slice_index)
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def seed_other_gpus(devices: Sequence[int]) -> None:
    """Give the layers on further GPUs of this process numbers of their own; `seed_layers` came before, for the first.

    In a thread for each GPU they draw at the same time, each from its GPU's generator.
    """
    for position, device in enumerate(devices, start=1):
        torch.cuda.default_generators[device].manual_seed(derive(torch.initial_seed(), position))
