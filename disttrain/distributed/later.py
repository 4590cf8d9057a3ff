"""A device that works behind the host's back, and numbers that come from it without waiting for all it was given.

To look at a number on a GPU is to wait for everything in its queue, which is empty afterwards: it then idles until the
host has issued more. What is read a step later costs nothing, since the device is busy with the next step meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def is_asynchronous(device: torch.device) -> bool:
    """Whether a look at a number on the device waits for a queue of work. Called as `later.is_asynchronous`: tests
    have a CPU pass for such a device."""
    return device.type == "cuda"


def to_host_later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to bring a tensor, which must not be written to any more, to the host.

    A call of the result waits until it is there, and not for what the device is given after it.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    is_there.record(torch.cuda.current_stream(tensor.device))

    def read() -> torch.Tensor:
        is_there.synchronize()
        return host

    return read


def from_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on a device that is not waited for, as CUDA may do for memory that the system can move."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
