"""What started this worker, and in what place, by its environment: available before torch is imported, and without."""

from __future__ import annotations

import os
from collections.abc import Mapping

from disttrain.errors import ConfigurationError
from disttrain.layout import LAUNCHED_BY, LAUNCHER_OPTIONS, NODE_SLOT

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = "disttrain"
"""What our own launcher of one machine calls itself."""
NODE_LAUNCHER = "disttrain node"
"""And that of each of several machines."""
OUR_LAUNCHERS = (LAUNCHER, NODE_LAUNCHER)
"""Those that show the first failing worker's message, and that workers end with."""


def launched_by(environment: Mapping[str, str] = os.environ) -> str:
    """Which launcher started this worker: "torchrun", the one of ours that names itself, or "python" for none."""
    if LAUNCHED_BY in environment:
        return environment[LAUNCHED_BY]
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "python"


def rank_hint(environment: Mapping[str, str] = os.environ) -> int | None:
    """This worker's rank as far as it can be known outside a world; None if no launcher gave it one."""
    text = environment.get("RANK", "")
    return int(text) if text.isdecimal() else None


def launcher_options(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The options of our launcher of one machine besides the recipe and the run, as a shell takes it: `-n 2`."""
    told = environment.get(LAUNCHER_OPTIONS, "")
    return (told,) if told and launched_by(environment) == LAUNCHER else ()


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
