"""Whether all numbers are finite, in as few calls and waits as possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch


class QuickCheck:
    """The gradients of parameters that are all of one type on one device, as those of most models are.

    In a small model's step a look at each gradient from Python takes longer than all their numbers.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], device: torch.device) -> None:
        self._parameters = parameters
        self._is_bad, self._one = torch.zeros(1, device=device), torch.ones(1, device=device)

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor]) -> QuickCheck | None:
        """The check for these parameters; None if they are not alike, or there is no kernel for them."""
        kinds = {(one.device, one.dtype) for one in parameters if one.layout == torch.strided}
        if len(kinds) != 1:
            return None
        ((device, dtype),) = kinds
        return cls(parameters, device) if dtype.is_floating_point and _has_check(device.type, dtype) else None

    def all_finite(self) -> bool | None:
        """Whether every number in the gradients is finite; None if it cannot tell, as of sparse ones."""
        gradients = [one.grad for one in self._parameters if one.grad is not None]
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._is_bad, self._one)
        except RuntimeError:
            return None
        if not self._is_bad.item():
            return True
        self._is_bad.zero_()
        return False


def is_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every number in them is finite, asked of one tensor after the other: for rare occasions."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every number in these gradients is finite. On a GPU it is one kernel for each type, and one wait."""
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        alike.setdefault((real.device, real.dtype), []).append(real)
    found = []
    for (device, dtype), group in alike.items():
        if _has_check(device.type, dtype):
            # A gradient scaler's own operator: it multiplies by one, which leaves every number as it is.
            is_bad = torch.zeros(1, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(group, is_bad, torch.ones(1, device=device))
            found.append(is_bad == 0)
        elif filled := [tensor for tensor in group if tensor.numel()]:  # an empty tensor has no largest number
            found.append(torch.stack(torch._foreach_norm(filled, math.inf)).isfinite().all())
    if len(found) == 1:
        return bool(found[0])
    return bool(torch.stack([is_good.to(found[0].device).view(()) for is_good in found]).all()) if found else True


def _has_check(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the gradient scaler's operator takes this type: on GPUs it has no kernel for bfloat16."""
    return device_type == "cpu" or dtype in (torch.float64, torch.float32, torch.float16)
