"""How many GPUs there are, and a worker would see, without importing torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping


class OnePerGpu(int):
    """As many workers as there are GPUs, because one for each was asked for: none may end up on the CPU."""


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else those of the machine."""
    installed = installed_gpus()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or installed == 0:
        return installed
    count = 0
    for device in (part.strip() for part in visible.split(",")):
        # CUDA reads the list up to the first device that does not exist.
        if not device or (device.lstrip("-").isdigit() and not 0 <= int(device) < installed):
            break
        count += 1
    return count


def installed_gpus() -> int:
    """How many NVIDIA GPUs the driver shows."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
