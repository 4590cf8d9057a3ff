"""Additions of integers."""

from __future__ import annotations

import numpy as np
import torch


def add(one: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write the sum of two tensors of one type to a third, which may be one of them; no gradient is followed.

    NumPy adds integers of 64 bits in a third of the time: PyTorch multiplies one of them by 1 first, as if by a factor
    (torch 2.14, AVX-512).
    """
    if one.dtype == torch.int64 and one.device.type == "cpu":
        np.add(one.numpy(), other.numpy(), out=out.numpy())
    else:
        torch.add(one, other, out=out)
