"""An all-reduce between real processes: what training depends on."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from functools import partial

from disttrain.doctor.finding import Finding, failure, ok
from disttrain.doctor.isolated import CrashedError, Isolated

_NUM_ELEMENTS = 1 << 20
PATIENCE_S = 600.0
"""Seconds that one process waits for another: the check as a whole has a shorter limit."""


def gloo() -> Iterator[Finding]:
    """4 MiB summed over two processes on CPUs."""
    began = time.monotonic()
    try:
        all_reduced("cpu", 2)
    except (CrashedError, ValueError) as error:
        yield failure(
            "gloo",
            f"two processes of this machine cannot add a tensor: {error}",
            "Look at the checks of host name, interface and ports below; GLOO_SOCKET_IFNAME=lo makes gloo "
            "use the loopback interface, which is enough for one machine.",
        )
    else:
        yield ok("gloo", f"two processes added 4 MiB, {time.monotonic() - began:.1f} s from start to end")


def all_reduced(device: str, size: int) -> None:
    """Sum a tensor over `size` processes of this machine. Raises CrashedError, or ValueError for a wrong sum."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))  # not listening: rank 0 may, and no other process gets the port
        port = holder.getsockname()[1]
        workers = [Isolated(partial(_rank, rank, size, port, device)) for rank in range(size)]
        try:
            sums = [worker.result(time.monotonic() + PATIENCE_S) for worker in workers]
        finally:
            for worker in workers:
                worker.end()
    expected = float(sum(range(1, size + 1)))
    if sums != [[expected, expected]] * size:
        raise ValueError(f"the sum should be {expected} in every process, and is {sums}")


def _rank(rank: int, size: int, port: int, device: str) -> list[float]:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from disttrain.distributed.collectives import sum_
    from disttrain.distributed.world import join_world

    with join_world(device, timeout_s=PATIENCE_S) as world:
        total = sum_(torch.full((_NUM_ELEMENTS,), rank + 1.0, device=world.device))
        return [total.min().item(), total.max().item()]
