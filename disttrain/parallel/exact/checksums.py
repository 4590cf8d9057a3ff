"""Checksums of tensors' bits, which a device computes from what it holds: nothing but the checksums is sent.

Each word of 32 bits is multiplied by an odd number of 64 bits that depends on its place, and all are added up modulo
2^64. So no single flipped bit can go unseen, and any other difference with a chance of about 2^-63.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from disttrain.distributed.foreach import words

_SEED = 0x5EED
_NUM_WEIGHTS = 1 << 18  # two megabytes, which stay in a core's cache
_NEXT = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, too: what the chunks before are multiplied by


@torch.no_grad()
def checksums(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    """A checksum of each tensor; 0 for None. The device is looked at once, after all of them."""
    sums = [None if tensor is None or not tensor.numel() else _checksum(tensor) for tensor in tensors]
    present = [total for total in sums if total is not None]
    numbers = iter(torch.stack(present).tolist() if present else [])
    return [0 if total is None else next(numbers) for total in sums]


def checksum_of(numbers: Iterable[int]) -> int:
    """One checksum in place of several."""
    return int(_checksum(torch.tensor(list(numbers), dtype=torch.int64)))


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """(), int64, on the tensor's device."""
    weights = _weights(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in torch.split(words(tensor), _NUM_WEIGHTS):
        total.mul_(_NEXT).add_((chunk * weights[: len(chunk)]).sum())
    return total


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (_NUM_WEIGHTS,), dtype=torch.int64, generator=generator)
    return (drawn | 1).to(device)
