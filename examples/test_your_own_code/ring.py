"""Code under test: an all-reduce in a ring, as one writes it for an exercise, and the same with two planted bugs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

PassOn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pass_on(chunk: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Send a chunk to the right neighbour, and return the one from the left, which has the shape of `like`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = dist.isend(chunk.clone(), (rank + 1) % size)
    received = torch.empty_like(like)
    dist.recv(received, (rank - 1) % size)
    assert sent is not None
    sent.wait()
    return received


def ring_all_reduce(tensor: torch.Tensor, pass_on: PassOn = pass_on) -> None:
    """Sum `tensor` over all ranks, in place. Every rank must call it, with the same shape.

    Each rank cuts its tensor into as many chunks as there are ranks. In size - 1 steps every rank sends a chunk to its
    right neighbour and adds the one from its left to its own; then each rank holds one finished chunk. In size - 1
    further steps the finished chunks go round.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    chunks = list(tensor.view(-1).tensor_split(size))
    for step in range(size - 1):
        received = pass_on(chunks[(rank - step) % size], chunks[(rank - step - 1) % size])
        chunks[(rank - step - 1) % size] += received
    for step in range(size - 1):
        received = pass_on(chunks[(rank - step + 1) % size], chunks[(rank - step) % size])
        chunks[(rank - step) % size].copy_(received)


def ring_all_reduce_off_by_one(tensor: torch.Tensor) -> None:
    """A planted bug: the finished chunks start one place too early. With one or two ranks the sum is right."""
    rank, size = dist.get_rank(), dist.get_world_size()
    chunks = list(tensor.view(-1).tensor_split(size))
    for step in range(size - 1):
        received = pass_on(chunks[(rank - step) % size], chunks[(rank - step - 1) % size])
        chunks[(rank - step - 1) % size] += received
    for step in range(size - 1):
        received = pass_on(chunks[(rank - step - 1) % size], chunks[(rank - step - 2) % size])
        chunks[(rank - step - 2) % size].copy_(received)


def pass_on_that_stalls(chunk: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Another planted bug: every rank waits until its neighbour has received, and none receives."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.send(chunk, (rank + 1) % size)
    received = torch.empty_like(like)
    dist.recv(received, (rank - 1) % size)
    return received
