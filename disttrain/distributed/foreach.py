"""Operations on many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._utils import _flatten_dense_tensors

from disttrain.distributed import later


def copy_all_(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy each of `values` into its place in `into`, of the same shapes and types.

    On a GPU in one kernel for each type: a list of several types is copied there tensor by tensor.
    """
    if not into or not later.is_asynchronous(into[0].device):
        if into:
            torch._foreach_copy_(list(into), list(values))
        return
    for dtype in dict.fromkeys(one.dtype for one in into):
        pairs = [(one, value) for one, value in zip(into, values, strict=True) if one.dtype == dtype]
        torch._foreach_copy_([one for one, _ in pairs], [value for _, value in pairs])


def in_a_row(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All numbers of some tensors of one type in one vector; of a single tensor it may be the same memory."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    row: torch.Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return row


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
