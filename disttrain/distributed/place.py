"""A worker's place among the others, as its launcher wrote it."""

from __future__ import annotations

from collections.abc import Mapping

from disttrain.errors import ConfigurationError
from disttrain.layout import NODE_SLOT

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def slot_in(environment: Mapping[str, str]) -> tuple[int | None, int]:
    """(slot of this machine, number of slots), if the launcher gave it one."""
    slot, _, number = environment.get(NODE_SLOT, "").partition(" ")
    return (int(slot), int(number)) if slot.isdecimal() and number.isdecimal() else (None, 0)


def place_in(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, local rank, size, local size) as the launcher wrote them."""
    if not any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return 0, 0, 1, 1
    missing = [name for name in _LAUNCHER_VARIABLES if name not in environment]
    if missing:
        raise ConfigurationError(
            f"the launcher did not set {', '.join(missing)}: start workers with `disttrain train -n N` or torchrun, "
            "or unset RANK, WORLD_SIZE and LOCAL_RANK for a single worker."
        )
    numbers = []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = environment[name]
        if not text.isdecimal():
            raise ConfigurationError(f"{name}={text!r} is not a whole number: the launcher must set it.")
        numbers.append(int(text))
    rank, local_rank, size, local_size = numbers
    if not (rank < size and local_rank < local_size <= size):
        raise ConfigurationError(
            f"RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={size} LOCAL_WORLD_SIZE={local_size} do not fit together."
        )
    return rank, local_rank, size, local_size
