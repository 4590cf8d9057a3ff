"""Where a comparison runs: what its first line says, and whether machines can be simulated."""

from __future__ import annotations

import os
import platform
import signal
import sys

import torch

from disttrain.testing.hosts import why_not


def here() -> str:
    """PyTorch's version, the processor, and how busy it is."""
    load = os.getloadavg()[0]
    return f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}"


def has_machines() -> bool:
    """Whether machines can be simulated here; prints why not. A SIGTERM takes them down from now on, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if (reason := why_not()) is not None:
        print(f"not measured: {reason}")
    return reason is None
