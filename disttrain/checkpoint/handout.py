"""A checkpoint that rank 0 has read, on all ranks: its description as an object, its tensors one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

import torch

from disttrain.checkpoint.folder import Checkpoint
from disttrain.checkpoint.stored import StoredTensors, outline_of
from disttrain.checkpoint.tensors import Tensors
from disttrain.distributed.collectives import broadcast_, broadcast_from_main
from disttrain.distributed.packed import empty_on_cpu
from disttrain.distributed.sharded import from_part, is_sharded, part_of, rows_of
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
        return replace(whole, model=outline_of(whole.model), optimizer=outline_of(whole.optimizer))

    outlined = broadcast_from_main(world, outline)
    return cast("Found", whole if world.is_main else outlined)


def hand_out(world: World, tensors: Tensors, into: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Rank 0's `tensors` on every rank, in memory of their own; the others pass the outlines of them.

    They are read and travel one at a time, into the tensors of `into` where those fit: no rank needs memory for a
    second copy. Every rank must call it.
    """
    received = {}
    for name in tensors:
        place = into.get(name) if into is not None else None
        tensor = tensors[name]
        if place is not None and _fits(place, tensor):
            room = place.detach()
            if world.is_main:
                room.copy_(tensor)
        else:
            room = tensor.clone() if world.is_main else empty_on_cpu(tensor)
        received[name] = broadcast_(room) if world.size > 1 else room
    return received


def hand_out_parts(
    world: World, tensors: Tensors, like: Callable[[str], torch.Tensor | None], *, by_broadcast: bool
) -> dict[str, torch.Tensor]:
    """As `hand_out`, but each rank keeps only its part of a tensor for whose name `like` returns a sharded one.

    Without `by_broadcast` each rank reads its part of stored `tensors` from the files. With it a rank has one whole
    tensor at a time. Every rank must call it.
    """
    outlines = outline_of(tensors)
    # The same memory for each: what is freed between parts that are kept is too small for the next one.
    size = max((one.nbytes for one in outlines.values()), default=0) if by_broadcast and not world.is_main else 0
    room = torch.empty(size, dtype=torch.uint8)
    received = {}
    for name, outline in outlines.items():
        place = like(name)
        is_cut = place is not None and is_sharded(place) and place.shape == outline.shape
        if by_broadcast:
            here = tensors[name] if world.is_main else room[: outline.nbytes].view(outline.dtype).view(outline.shape)
            broadcast_(here)
            received[name] = part_of(here, place) if place is not None and is_cut else here.clone()
        elif place is not None and is_cut:
            assert isinstance(tensors, StoredTensors)
            rows = rows_of(place)
            received[name] = from_part(tensors.rows(name, rows.start, rows.stop).clone(), place)
        else:
            received[name] = tensors[name].clone()
    return received


def _fits(place: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (
        place.device.type == "cpu"
        and place.is_contiguous()
        and (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
    )
