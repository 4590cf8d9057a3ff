"""Which device a worker computes on: all of a job's on the same kind, and on a GPU only where each has its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from disttrain.errors import ConfigurationError
from disttrain.layout import DEVICE


def choose_device(
    name: str, local_rank: int, local_size: int, size: int, environment: Mapping[str, str] = os.environ
) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "mps"; `cuda` is bound to the local rank, `mps` serves a lone worker.

    "auto" is what the variable `layout.DEVICE` says, which launchers set that were asked for GPUs; without it, it takes
    GPUs only where each of the machine's `local_size` workers has its own. Raises ConfigurationError if the device is
    not there.
    """
    said = f"train.device = {name!r}"
    if name == "auto" and (wanted := environment.get(DEVICE, "auto")) != "auto":
        if wanted not in ("cpu", "cuda", "mps"):
            raise ConfigurationError(f"{DEVICE}={wanted!r} is not a valid device: set it to auto, cpu, cuda or mps.")
        name, said = wanted, f"{DEVICE}={wanted}, as -n gpu and --gpus have it"
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
        name = "cuda" if has_gpus else "mps" if has_mps and size == 1 else "cpu"
    if name == "mps" and not has_mps:
        raise ConfigurationError("train.device = 'mps': this machine has no Apple GPU; use 'auto' or 'cpu'.")
    if name == "mps" and size > 1:
        raise ConfigurationError("train.device = 'mps' serves one worker only: use -n 1, or train.device = 'cpu'.")
    if name != "cuda":
        return torch.device(name)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver too old still shows them
    if num_gpus == 0:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f", or CUDA_VISIBLE_DEVICES={visible!r} hides them"
        why = "is built without CUDA" if torch.version.cuda is None else f"sees no driver that fits{hidden}"
        raise ConfigurationError(
            f"{said}: PyTorch sees no GPU here (torch {torch.__version__} {why}): see `disttrain doctor`, or use 'cpu'."
        )
    if local_rank >= num_gpus:
        raise ConfigurationError(
            f"worker {local_rank} of this machine has no GPU of its own: PyTorch sees {num_gpus}. "
            f"Start at most {num_gpus} (-n gpu), or set train.device = 'auto' or 'cpu'."
        )
    return torch.device("cuda", local_rank)


def pci_address(device: torch.device) -> str | None:
    """Where a GPU is connected, as in 0000:17:00.0; None for other devices, and where it is not known."""
    if device.type != "cuda":
        return None
    found: Any = torch.cuda.get_device_properties(device)
    try:
        return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except AttributeError:  # not NVIDIA's
        return None


def why_not_gpus(name: str, chosen: torch.device, local_size: int) -> str:
    """Why workers of a machine with GPUs compute on the CPU although `name` is "auto"; empty if they do not."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "auto" or chosen.type != "cpu" or num_gpus == 0:
        return ""
    gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    return f"{local_size} workers on a machine with {gpus}: all use the CPU; -n {num_gpus} would use {gpus}"


def refuse_a_mixture(places: Sequence[str]) -> None:
    """Raise ConfigurationError if the ranks do not all compute on the same kind; `places` as "cuda on HOST"."""
    for rank, place in enumerate(places):
        if place.split()[0] != places[0].split()[0]:
            raise ConfigurationError(
                f"rank 0 would use {places[0]}, and rank {rank} {place}: set train.device = 'cpu', or start as many "
                "workers on each machine as it has GPUs."
            )
