"""Who this worker is, and the process group it shares with the others.

The only reader of RANK-style variables and the only caller of `init_process_group`. One worker has a process group
too, so there is one path through the code, not two.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions' default arguments hold the process group of the moment when it is first imported, as the first step of
# an optimizer does. Imported here, before there is one, it holds none: else `destroy_process_group` could not end
# gloo's threads, and one of them that is late aborts the process at its exit (pytorch/pytorch#179291, #190489).
import torch.distributed.nn.functional
from torch._C._distributed_c10d import HashStore, Store

from disttrain.affinity import near_memory
from disttrain.errors import ConfigurationError

_AFTER_THE_WATCHDOG_S = 15.0
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This worker's place among the workers of a job."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    host: str

    @property
    def is_main(self) -> bool:
        """True for the one worker that writes checkpoints, the journal and the console."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True for one worker of each machine: the one that downloads and measures."""
        return self.local_rank == 0

    @property
    def node(self) -> int:
        """Which machine this is, counted from 0."""
        return self.rank // self.local_size

    @property
    def num_nodes(self) -> int:
        """How many machines take part."""
        return -(-self.size // self.local_size)


@contextmanager
def join_world(device: str = "auto", threads: int = 0, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the job's process group, and leave it whatever happens.

    `threads` is the number of CPU threads of this worker; 0 shares the machine's cores out among its workers. A
    collective that takes longer than `timeout_s` fails, so much later that a watchdog with this limit speaks first. A
    launcher has set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without any of them
    this process is the only worker.

    Raises ConfigurationError if the variables are incomplete or the device is not there.
    """
    rank, local_rank, size, local_size = _place(os.environ)
    chosen = choose_device(device, local_rank, size)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, available_cores() // local_size))
    timeout = timedelta(seconds=timeout_s + max(_AFTER_THE_WATCHDOG_S, timeout_s / 4))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    with near_memory(local_rank, local_size):
        try:
            if size == 1:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
            else:
                device_id = chosen if chosen.type == "cuda" else None
                dist.init_process_group(backend, timeout=timeout, device_id=device_id)
            yield World(rank, local_rank, size, local_size, chosen, socket.gethostname())
        finally:
            torch.set_num_threads(threads_before)
            if dist.is_initialized():
                dist.destroy_process_group()


def store_for_a_thread(timeout_s: float) -> Store | None:
    """A connection of its own to the store that all ranks reach, for another thread; None for a worker that is alone.

    A key that is not there is waited for `timeout_s`.
    """
    if dist.get_world_size() == 1:
        return None
    store: Store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def launched_by(environment: Mapping[str, str] = os.environ) -> str:
    """Which launcher started this worker: "torchrun", what DISTTRAIN_LAUNCHER says, or "python" for none."""
    if "DISTTRAIN_LAUNCHER" in environment:
        return environment["DISTTRAIN_LAUNCHER"]
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "python"


def rank_hint(environment: Mapping[str, str] = os.environ) -> int | None:
    """This worker's rank as far as it can be told outside a world; None if no launcher gave it one."""
    text = environment.get("RANK", "")
    return int(text) if text.isdecimal() else None


def available_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(name: str, local_rank: int, size: int) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "mps"; `cuda` is bound to the local rank, `mps` serves a lone worker.

    Raises ConfigurationError if it is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps and size == 1 else "cpu"
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
            f"Start at most {num_gpus} (-n gpu), or set train.device = 'cpu'."
        )
    return torch.device("cuda", local_rank)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
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
