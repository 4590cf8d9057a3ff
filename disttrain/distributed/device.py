"""Which device a worker computes on: all of a job's on the same kind, and on a GPU only where each has its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.errors import ConfigurationError


def choose_device(name: str, local_rank: int, local_size: int, size: int) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "mps"; `cuda` is bound to the local rank, `mps` serves a lone worker.

    "auto" takes GPUs only where each of the machine's `local_size` workers has its own. Raises ConfigurationError if
    the device is not there.
    """
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
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise ConfigurationError("train.device = 'cuda': PyTorch sees no GPU here; use 'auto' or 'cpu'.")
    if local_rank >= num_gpus:
        raise ConfigurationError(
            f"worker {local_rank} of this machine has no GPU of its own: PyTorch sees {num_gpus}. "
            f"Start at most {num_gpus} (-n gpu), or set train.device = 'auto' or 'cpu'."
        )
    return torch.device("cuda", local_rank)


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
