"""A checkpoint that rank 0 has read, on all ranks: its description as an object, its tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

import torch

from disttrain.checkpoint import Checkpoint
from disttrain.distributed.collectives import broadcast_, broadcast_from_main
from disttrain.distributed.sharded import part_of
from disttrain.distributed.world import World

Found = TypeVar("Found", bound=Checkpoint | None)


def read_by_main(world: World, read: Callable[[], Found]) -> Found:
    """The checkpoint that `read` returns on rank 0; what it raises there is raised everywhere.

    The other ranks get everything but the numbers: their tensors have a shape and a type, and are on the device "meta".
    So each can check what it was given before `hand_out` brings the rest. Every rank must call it.
    """
    whole: Found | None = None

    def outline() -> Checkpoint | None:
        nonlocal whole
        whole = read()
        if whole is None:
            return None
        return replace(whole, model=_outline(whole.model), optimizer=_outline(whole.optimizer))

    outlined = broadcast_from_main(world, outline)
    return cast("Found", whole if world.is_main else outlined)


def hand_out(
    world: World, tensors: dict[str, torch.Tensor], into: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Rank 0's `tensors` on every rank; the others pass the outlines of them.

    They travel one at a time, into the tensors of `into` where those fit: no rank needs memory for a second copy. Every
    rank must call it.
    """
    if world.size == 1:
        return tensors
    received = {}
    for name, tensor in tensors.items():
        room = tensor
        if not world.is_main:
            place = into.get(name) if into is not None else None
            fits = place is not None and _fits(place, tensor)
            room = place.detach() if place is not None and fits else torch.empty_like(tensor, device="cpu")
        received[name] = broadcast_(room)
    return received


def hand_out_parts(
    world: World, tensors: dict[str, torch.Tensor], like: Callable[[str], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """As `hand_out`, but each rank keeps only its part of a tensor for whose name `like` returns a sharded one.

    A rank has one whole tensor at a time, and rank 0 those that it has read. Every rank must call it.
    """
    received = {}
    for name, tensor in tensors.items():
        room = broadcast_(tensor if world.is_main else torch.empty_like(tensor, device="cpu"))
        place = like(name)
        received[name] = room if place is None or place.shape != room.shape else part_of(room, place).to(room.dtype)
    return received


def _outline(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _fits(place: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (
        place.device.type == "cpu"
        and place.is_contiguous()
        and (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
    )
