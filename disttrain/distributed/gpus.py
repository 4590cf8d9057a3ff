"""How many GPUs there are, and a worker would see, without importing torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence


class OnePerGpu(int):
    """As many workers as there are GPUs, because one for each was asked for: none may end up on the CPU."""


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of NVIDIA GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else those of the machine."""
    installed = _uuids()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not installed:
        return len(installed)
    if visible.lstrip().startswith("MIG-"):
        return 1  # CUDA shows a process one part of a GPU, however many are listed
    return len(shown_gpus(visible, installed))


def shown_gpus(visible: str, installed: Sequence[str]) -> list[int]:
    """Which of the installed GPUs, given as UUIDs, CUDA shows in which order if CUDA_VISIBLE_DEVICES is `visible`."""
    found: list[int] = []
    for device in (part.strip() for part in visible.split(",")):
        index = _index(device, installed, by_uuid=visible.lstrip().startswith("GPU-"))
        if index is None:  # CUDA reads the list up to the first device that does not exist
            break
        if index in found:  # and shows none at all if one is there twice
            return []
        found.append(index)
    return found


def installed_gpus() -> int:
    """How many NVIDIA GPUs the driver shows."""
    return len(_uuids())


def _index(device: str, installed: Sequence[str], *, by_uuid: bool) -> int | None:
    """Which of the installed GPUs is meant, by its number or the beginning of its UUID; None: there is no such one."""
    if by_uuid:
        found = [index for index, uuid in enumerate(installed) if device.startswith("GPU-") and uuid.startswith(device)]
        return found[0] if len(found) == 1 else None
    number = re.match(r"\d+", device, re.ASCII)  # what follows the digits does not count
    return int(number[0]) if number and int(number[0]) < len(installed) else None


def _uuids() -> list[str]:
    """Those of the GPUs that the driver shows; one that it does not name is empty."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: what it prints is no text
        return []
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [(re.search(r"UUID: (\S+?)\)", line) or ("", ""))[1] for line in lines]
