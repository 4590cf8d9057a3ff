"""`torch._dynamo`, imported only if something is compiled.

PyTorch keeps its compiler out of its optimizers, and calls the compiler's module for that at their first use: an import
of 1.3 s of processor time in every worker, although nothing is compiled. Where that module is not there, no compiler
has to be kept out. What of PyTorch looks otherwise than expected here is left as it is, and imports it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

_CACHED = "__dynamo_disable"  # where `torch._disable_dynamo` keeps what it calls in place of the function
_DISABLED = (
    (torch.optim.Optimizer, ("add_param_group", "zero_grad", "state_dict", "load_state_dict")),
    (DistributedDataParallel, ("_inside_ddp_forward",)),
)


def import_dynamo_late() -> None:
    """Have PyTorch's optimizers and DDP do without `torch._dynamo` until something else imports it."""
    if _is_imported():
        return
    for owner, names in _DISABLED:
        for name in names:
            guarded = getattr(owner, name, None)
            function: Any = inspect.unwrap(guarded) if guarded is not None else None
            if function is not guarded and not hasattr(function, _CACHED):
                setattr(function, _CACHED, _until_imported(function))
    for kind in vars(torch.optim).values():
        step = vars(kind).get("step") if isinstance(kind, type) else None
        if step is not None and step.__code__.co_name == "_use_grad":  # torch.optim's own decorator
            kind.step = _without_graph_break(step)


def _is_imported() -> bool:
    return "torch._dynamo" in sys.modules


def _until_imported(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_imported() and hasattr(function, _CACHED):
            delattr(function, _CACHED)  # from the next call on, PyTorch does it in its own way
        return function(*args, **kwargs)

    return call


def _without_graph_break(step: Callable[..., Any]) -> Callable[..., Any]:
    """As `step` is, which breaks a compiled graph before and after the step of the optimizer that it wraps."""
    bare = inspect.unwrap(step)

    @functools.wraps(step)
    def call(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _is_imported():
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return bare(self, *args, **kwargs)

    return call
