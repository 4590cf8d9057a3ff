"""Where a thread is, read from its stack."""

from __future__ import annotations

import os
from types import FrameType

_MOST_FRAMES = 4
# A rank in one of these waits for the others: it does not hold them up. On a GPU that is where it waits for the step.
_WAITING_FILES = (
    "torch/distributed/",
    "torch/nn/parallel/distributed.py",
    "disttrain/distributed/collectives.py",
    "disttrain/distributed/later.py",
    "disttrain/distributed/shared_sums.py",
    "disttrain/distributed/exact_sum.py",
    "disttrain/parallel/exact/ahead.py",
    "disttrain/health/finite.py",
    "disttrain/health/nonfinite.py",
)
_WAITING_FUNCTIONS = ("_engine_run_backward",)  # in DDP the gradients of all meet at its end


def innermost(frame: FrameType | None) -> tuple[str, ...]:
    """The innermost calls, those of torch and of this package last: where a user would look first."""
    users: list[str] = []
    others: list[str] = []
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        is_ours = f"{os.sep}disttrain{os.sep}" in path or f"{os.sep}torch{os.sep}" in path or path.startswith("<")
        (others if is_ours else users).append(f"{path}:{frame.f_lineno} in {name}")
        frame = frame.f_back
    # What runs the worker (runpy, click) is not the user's code, and stands at the outer end.
    users = [line for line in users if f"{os.sep}click{os.sep}" not in line and "runpy" not in line]
    return tuple([*users, *others][:_MOST_FRAMES])


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether the main thread waits for other ranks, as far as its stack shows."""
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        if any(part in path for part in _WAITING_FILES) or frame.f_code.co_name in _WAITING_FUNCTIONS:
            return True
        if "/torch/" not in path:
            return False
        frame = frame.f_back
    return False
