"""Operations on many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
