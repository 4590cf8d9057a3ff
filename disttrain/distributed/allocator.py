"""What becomes of memory that a step frees: kept for the next one, or returned to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil

from disttrain.distributed.control_groups import memory_limit

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
# Larger blocks go back to the system at once, as ever.
_LARGEST_KEPT = 1 << 30
# As far as glibc moves its own threshold, and the most that versions before 2.35 take.
_LARGEST_BY_ITSELF = 32 << 20
_SMALLEST_RETURNED = 1 << 20
_WORTH_TRIMMING = 8 << 20
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = "GLIBC_TUNABLES"


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have glibc keep what is freed while the block runs, and return it to the system afterwards.

    By its own rule it returns the end of its heap when that has become twice as large as the largest block freed so
    far. Whether a step's tensors lie at the end follows from chance, and where they do, each step asks the system for
    the same pages again, which fills them with zeros: a fifth of a small network's step. Nothing is changed where the
    user has set a threshold, and nothing happens without glibc; other allocators (jemalloc by LD_PRELOAD) do not look.
    """
    keep_freed_memory()
    glibc = _glibc()
    if glibc is None or is_set_by_user(os.environ):
        yield
        return
    try:
        yield
    finally:
        # What it was cannot be asked. This is where glibc arrives by itself once a block of that size has been freed.
        glibc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BY_ITSELF)
        glibc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_BY_ITSELF)
        glibc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, from now on, as `freed_memory_kept` has it."""
    glibc = _glibc()
    if glibc is None or is_set_by_user(os.environ):
        return
    if not glibc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT):
        glibc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BY_ITSELF)
    glibc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Have glibc return each large block to the system when it is freed, from now on, and all that is free at once.

    A block of weights that is gathered, cut up and freed again and again leaves holes that the next one does not fit
    into, since it has to begin at a multiple of 64 bytes (glibc 2.36): the heap grew to several times the model.
    """
    glibc = _glibc()
    if glibc is None or is_set_by_user(os.environ):
        return
    glibc.mallopt(_M_MMAP_THRESHOLD, _SMALLEST_RETURNED)
    glibc.mallopt(_M_TRIM_THRESHOLD, 2 * _SMALLEST_RETURNED)
    glibc.malloc_trim(0)


def trim_after(num_bytes: int) -> None:
    """Have glibc return what is free to the system, after something that is large enough to be worth the time.

    Activations are many small blocks, which stay in the heap when they are freed, as long as something lies above them.
    """
    if num_bytes < _WORTH_TRIMMING:
        return
    glibc = _glibc()
    if glibc is not None and not is_set_by_user(os.environ):
        glibc.malloc_trim(0)


def available_memory() -> int:
    """What programs may take on this machine, in bytes: what is free, and no more than the container's limit."""
    available, limit = int(psutil.virtual_memory().available), memory_limit()
    return available if limit is None else min(available, limit)


def is_set_by_user(environment: Mapping[str, str]) -> bool:
    """Whether the environment sets any of malloc's thresholds."""
    tunables = environment.get(_TUNABLES, "").split(":")
    names = tuple(f"glibc.malloc.{name.removeprefix('MALLOC_').rstrip('_').lower()}=" for name in _SETTINGS)
    return any(name in environment for name in _SETTINGS) or any(one.startswith(names) for one in tunables)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process if it is glibc."""
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # another library, another system
        return None
    return ctypes.CDLL(None) if is_glibc else None
