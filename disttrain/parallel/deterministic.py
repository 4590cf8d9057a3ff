"""Deterministic kernels only, without the compiler that PyTorch imports to let it know."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CONFIG, _VARIABLE = "torch._inductor.config", "TORCHINDUCTOR_DETERMINISTIC"
# All that `torch.use_deterministic_algorithms` is known to touch (torch 2.14).
_KNOWN = {_CONFIG, "_inductor", "config", "deterministic", "_C", "_set_deterministic_algorithms"}


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """`torch.use_deterministic_algorithms(True)` while the block runs; afterwards as it was before.

    That function imports PyTorch's compiler, 1.2 s of processor time in every worker, to set one variable there. While
    the compiler is not imported, it is enough to set what that variable is read from when it is.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    variable = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    _use(True)
    try:
        yield
    finally:
        if variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = variable
        _use(was_on, warn_only=warned_only)


def _use(mode: bool, *, warn_only: bool = False) -> None:
    does = set(torch.use_deterministic_algorithms.__code__.co_names)
    if _CONFIG in sys.modules or not does <= _KNOWN:  # a version that does more does it itself
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    else:
        torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)
