"""The mean of all ranks' tensors, sent as integers of 8 bits: a quarter of float32's bytes, however many ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from disttrain.distributed.collectives import max_

_BLOCK = 512  # numbers that share a scale, which is sent in 4 bytes: less than 1 % beside theirs
_LARGEST = 127


def int8_mean_(tensors: Sequence[torch.Tensor], num_ranks: int) -> None:
    """Replace real or complex finite tensors, all on one device, by their mean over all ranks. Every rank must call it.

    A scale for each 512 numbers of a tensor is the largest magnitude among them on any rank; a number travels as a
    127th of it, rounded to nearest. Each rank adds up its share of the numbers as integers and sends the mean on,
    rounded once more: so a mean is off by less than a 127th of its scale, is the same on every rank, and does not
    depend on which rank had what.
    """
    reals = [torch.view_as_real(one) if one.is_complex() else one for one in tensors]
    wide = torch.float64 if any(one.dtype is torch.float64 for one in reals) else torch.float32
    flat = [one.to(wide).reshape(-1) for one in reals]
    largest = max_(torch.cat([_largest_in_blocks(one) for one in flat]))
    # Whatever is too small to divide by counts as zero.
    scales = torch.where(largest < torch.finfo(wide).tiny, 1.0, largest)
    by_number = scales.repeat_interleave(torch.cat([_block_sizes(one.numel()) for one in flat]).to(scales.device))
    numbers = torch.cat(flat)
    mean = _mean_of_integers(numbers.div_(by_number).mul_(_LARGEST).round_().to(torch.int8), num_ranks)
    result = mean.to(wide).div_(_LARGEST).mul_(by_number)
    for real, part in zip(reals, torch.split(result, [one.numel() for one in flat]), strict=True):
        real.copy_(part.view(real.shape))


def _largest_in_blocks(flat: torch.Tensor) -> torch.Tensor:
    return pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK).abs().amax(1)


def _block_sizes(number: int) -> torch.Tensor:
    sizes = torch.full((-(-number // _BLOCK),), _BLOCK)
    if number % _BLOCK:
        sizes[-1] = number % _BLOCK
    return sizes


def _mean_of_integers(mine: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The mean of int8 numbers, rounded to nearest. An all-reduce would overflow where it adds them up in 8 bits."""
    shares = pad(mine, (0, -mine.numel() % num_ranks))
    received = torch.empty_like(shares)  # every rank's numbers of this rank's share
    dist.all_to_all_single(received, shares)
    total = received.view(num_ranks, -1).sum(0, dtype=torch.int32)
    share = (total.double() / num_ranks).round_().to(torch.int8)
    dist.all_gather(list(shares.view(num_ranks, -1)), share)
    return shares[: mine.numel()]
