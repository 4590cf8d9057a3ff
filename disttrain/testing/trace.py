"""In a worker: write down every collective that is called, with its tensor and its call site.

One line of JSON per call and one per return, into a file that the test process holds: it can be read when the worker
hangs, and after it has died. Reductions that C++ starts on its own (DDP's buckets) do not pass here.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# The argument whose shape and dtype must be the same on every rank, if there is one.
_COLLECTIVES: dict[str, str | None] = {
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "broadcast": "tensor",
    "reduce": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_coalesced": "input_tensor_list",
    "gather": "tensor",
    "scatter": "tensor",
    "reduce_scatter": "output",
    "reduce_scatter_tensor": "output",
    "all_to_all": None,
    "all_to_all_single": None,
    "barrier": None,
    "monitored_barrier": None,
    "all_gather_object": None,
    "gather_object": None,
    "broadcast_object_list": None,
    "scatter_object_list": None,
}
_POINT_TO_POINT: dict[str, str | None] = {
    "send": "tensor",
    "recv": "tensor",
    "isend": "tensor",
    "irecv": "tensor",
    "send_object_list": None,
    "recv_object_list": None,
    "batch_isend_irecv": None,
}
_AGREED = ("op", "src", "dst", "group_src", "group_dst")  # arguments that must be the same on every rank
_MOST_SITES = 3
_NOT_THE_USERS = (
    f"{os.sep}site-packages{os.sep}torch{os.sep}",
    f"{os.sep}site-packages{os.sep}hypothesis{os.sep}",
    os.path.dirname(__file__) + os.sep,
    f"{os.sep}_pytest{os.sep}",
    f"{os.sep}pluggy{os.sep}",
    f"{os.sep}contextlib.py",
    "<frozen",
    "<string>",
)


class Recorder:
    """Numbers the calls of this process and writes them down. Idle until `start`."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._next = 0
        self._depth = threading.local()

    def start(self, fd: int) -> None:
        """Write to this file from now on."""
        self._fd = fd

    def wrap(self, function: Callable[..., Any], tensor: str | None, collective: bool) -> Callable[..., Any]:
        """The function, which is written down first. Collectives made of others count once."""
        places = {name: index for index, name in enumerate(inspect.signature(function).parameters)}

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            if self._fd is None or getattr(self._depth, "value", False):
                return function(*args, **kwargs)

            def argument(name: str) -> Any:
                return kwargs[name] if name in kwargs else args[places[name]] if places[name] < len(args) else None

            named = {
                name: argument(name) for name in (tensor, "group", *_AGREED) if name is not None and name in places
            }
            number = self._enter(function.__name__, named, tensor, collective)
            self._depth.value = True
            try:
                return function(*args, **kwargs)
            finally:
                self._depth.value = False
                if number is not None:
                    self._write({"left": number})

        return recorded

    def _enter(self, op: str, named: dict[str, Any], tensor: str | None, collective: bool) -> int | None:
        import torch.distributed as dist

        group: Any = named.get("group")
        if not dist.is_initialized():
            return None
        if group is None:
            group = dist.group.WORLD
        try:
            name, ranks = group.group_name, dist.get_process_group_ranks(group)
        except (AttributeError, ValueError, RuntimeError):  # not a member, or a backend used directly
            return None
        number, self._next = self._next, self._next + 1
        details = {key: str(value) for key in _AGREED if (value := named.get(key)) is not None}
        if op in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"):
            details.setdefault("op", "RedOpType.SUM")
        record = {
            "number": number,
            "op": op,
            "collective": collective,
            "group": name,
            "ranks": ranks,
            "tensors": _describe(named.get(tensor)) if tensor else [],
            "details": {key: value.removeprefix("RedOpType.") for key, value in details.items()},
            "sites": _sites(sys._getframe(2)),
            "time": time.time(),
        }
        self._write(record)
        return number

    def _write(self, record: dict[str, Any]) -> None:
        assert self._fd is not None
        os.write(self._fd, (json.dumps(record) + "\n").encode())


def _describe(value: Any) -> list[str]:
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return [
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for tensor in tensors
        if hasattr(tensor, "dtype") and hasattr(tensor, "shape")
    ]


def _sites(frame: FrameType | None) -> list[list[Any]]:
    """Who called, innermost first: frames of torch, of pytest and of this harness left out."""
    sites: list[list[Any]] = []
    while frame is not None and len(sites) < _MOST_SITES:
        path = frame.f_code.co_filename
        if not any(part in path for part in _NOT_THE_USERS):
            sites.append([path, frame.f_lineno, frame.f_code.co_name])
        frame = frame.f_back
    return sites


RECORDER = Recorder()  # one per process, as the functions it wraps are


def install() -> None:
    """Put the recorder around torch.distributed's functions, before they are imported by name."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    for collective, table in ((True, _COLLECTIVES), (False, _POINT_TO_POINT)):
        for name, tensor in table.items():
            function = getattr(c10d, name, None)
            if function is not None:
                recorded = RECORDER.wrap(function, tensor, collective)
                setattr(c10d, name, recorded)
                setattr(dist, name, recorded)
