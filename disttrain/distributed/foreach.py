"""Operations on many tensors at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch._utils import _flatten_dense_tensors

from disttrain.distributed import later

_WORDS = {1: torch.uint8, 2: torch.int16}
# In a third of torch.equal's time: 7 ms in place of 19 for 11 million numbers of 32 bits.
_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


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


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a copy if it is conjugated or negated only when it is read, which NumPy and views refuse."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def words(tensor: torch.Tensor) -> torch.Tensor:
    """All bits of a tensor, in the order of its elements: a vector of integers of 8, 16 or 32 bits."""
    flat = settled(tensor.detach()).contiguous().reshape(-1)
    return flat.view(_WORDS.get(flat.element_size(), torch.int32))


def differ(ones: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> torch.Tensor | bool:
    """Whether a bit, a shape or a type of one list's tensors is not that of the other's; a GPU is not waited for.

    There it is a (), bool, on the GPU, which needs memory for two more of each.
    """
    if list(map(_kind, ones)) != list(map(_kind, others)):
        return True
    pairs = [
        (words(one), words(other))
        for one, other in zip(ones, others, strict=True)
        if one is not None and other is not None
    ]
    if not pairs or not later.is_asynchronous(pairs[0][0].device):
        return any(_compare(one.data_ptr(), other.data_ptr(), one.nbytes) for one, other in pairs)
    found = []
    for dtype in dict.fromkeys(one.dtype for one, _ in pairs):
        mine, theirs = zip(*(pair for pair in pairs if pair[0].dtype == dtype), strict=True)
        found.append((torch.cat(mine) != torch.cat(theirs)).any())
    return torch.stack(found).any()


def _kind(tensor: torch.Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
