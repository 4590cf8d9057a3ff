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
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    return not any(bool(flag_of_non_finite(group, device)) for device, group in by_device.items())


def flag_of_non_finite(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """1 if any number in these gradients, all on `device`, is not finite, else 0: () float32 there, not looked at."""
    alike: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        alike.setdefault(real.dtype, []).append(real)
    is_bad, one = torch.zeros((), device=device), torch.ones((), device=device)
    for dtype, group in alike.items():
        if _has_check(device.type, dtype):
            # A gradient scaler's own operator: it multiplies by one, which leaves every number as it is.
            torch._amp_foreach_non_finite_check_and_unscale_(group, is_bad, one)
        elif filled := [tensor for tensor in group if tensor.numel()]:  # an empty tensor has no largest number
            largest = torch.stack(torch._foreach_norm(filled, math.inf))
            is_bad = torch.where(largest.isfinite().all(), is_bad, one)
    return is_bad


def _has_check(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the gradient scaler's operator takes this type: on GPUs it has no kernel for bfloat16."""
    return device_type == "cpu" or dtype in (torch.float64, torch.float32, torch.float16)
