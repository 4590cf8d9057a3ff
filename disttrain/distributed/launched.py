"""What started this worker, as far as its environment shows: available before torch is imported, and without it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from disttrain.layout import LAUNCHED_BY, LAUNCHER_OPTIONS

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
