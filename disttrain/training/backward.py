"""How a backward pass begins, in as little time as it takes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

# Private, and the same from torch 2.11 to 2.14; without it the public way is as right.
_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


def backward_from(loss: torch.Tensor, gradient: torch.Tensor) -> None:
    """`loss.backward(gradient)`, for a gradient of the loss's shape and type.

    PyTorch compares the two shapes by a module that imports SymPy, 0.4 s of processor time in every worker. (To
    multiply the loss by the gradient would be the same bits without it, and three more kernels in each step.)
    """
    if _run_backward is None or type(loss) is not torch.Tensor:
        loss.backward(gradient)  # type: ignore[no-untyped-call]
        return
    _run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@lru_cache(maxsize=16)  # mostly the same in each step
def constant_over(
    weight: int, value: float, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`value / weight`, rounded as the type has it, of this shape: not to be written to."""
    return torch.full(shape, value, dtype=dtype, device=device) / weight
