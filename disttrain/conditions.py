"""What the bits of a run rest on besides its recipe, and how exact mode holds on to it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from disttrain.recipe import Recipe

_debugging: Any = torch.utils.deterministic
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def exact_conditions(recipe: Recipe) -> Iterator[None]:
    """In exact mode: `train.threads` threads (0: one), and deterministic kernels only; all as before afterwards.

    In fast mode it changes nothing. To be entered before the first kernel runs on a GPU: cuBLAS reads its workspace's
    size once.
    """
    if not recipe.parallel.exact:
        yield
        return
    threads, workspace = torch.get_num_threads(), os.environ.get(_CUBLAS_WORKSPACE)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled, benchmarked = _debugging.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    # The machine's cores shared out among its workers would be another number at another world size.
    torch.set_num_threads(recipe.train.threads or 1)
    torch.use_deterministic_algorithms(True)
    _debugging.fill_uninitialized_memory = False  # a help in debugging that writes all memory twice
    torch.backends.cudnn.benchmark = False  # it would choose kernels by how fast they happen to be
    os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        _debugging.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmarked
        if workspace is None:
            os.environ.pop(_CUBLAS_WORKSPACE, None)


def what_bits_rest_on(device: torch.device) -> dict[str, Any]:
    """The facts about this process that its floating-point results depend on, as JSON can hold them."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cublas_workspace": os.environ.get(_CUBLAS_WORKSPACE),
        }
    return facts


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The facts that both know and that are not the same, in words."""
    return [f"{name} was {was}, now {now[name]}" for name, was in before.items() if name in now and now[name] != was]


def unlike_the_first(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which facts workers differ from rank 0, in words; `facts` by rank."""
    return [
        f"{name} is {value} on rank 0 and {facts[rank].get(name)} on rank {rank}"
        for name, value in facts[0].items()
        for rank in [next((rank for rank, of in enumerate(facts) if of.get(name) != value), 0)]
        if rank
    ]
