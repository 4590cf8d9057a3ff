"""What to start on one machine, as a value."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from disttrain.distributed.cores import usable_cores
from disttrain.distributed.gpus import OnePerGpu
from disttrain.distributed.launched import LAUNCHER
from disttrain.layout import DEVICE, LAUNCHED_BY, LAUNCHER_OPTIONS, LAUNCHER_PID, LEASE, NODE_SLOT, log_name


def module_arguments(module: str, *arguments: str) -> tuple[str, ...]:
    """What follows the interpreter on the command line that runs a module.

    -P keeps the current folder off the front of sys.path, where its `select.py` would take the place of Python's own.
    """
    return ("-P", "-m", module, *arguments)


@dataclass(frozen=True)
class WorkerGroup:
    """`size` times `python *arguments`.

    Args:
        arguments: what follows the interpreter on each worker's command line.
        size: how many workers; an `OnePerGpu` has each use its GPU.
        log_dir: where workers other than rank 0 write what they would print; None: only shown if they die of it.
        grace_s: seconds between SIGTERM and SIGKILL, when one worker's failure ends the others.
        options: the launcher's own options, as a shell takes them, for the command that resumes the run.
    """

    arguments: tuple[str, ...]
    size: int
    log_dir: Path | None = None
    grace_s: float = 5.0
    options: str = ""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What its workers inherit besides those that each has for itself."""
        return ()

    def log(self, rank: int, *, joins: bool = False) -> Path | None:
        """The file with what a worker prints, if it has one; rank 0 prints to the user, unless it `joins` later."""
        return self.log_dir / log_name(rank) if self.log_dir is not None and (rank > 0 or joins) else None

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """A worker's environment: this process's own, and the variables that torchrun would set."""
        own = {LAUNCHER_PID: str(os.getpid()), LAUNCHER_OPTIONS: self.options}
        not_ours = {LEASE: "", NODE_SLOT: ""}  # of a worker of several machines, if one has started this launcher
        return {**os.environ, **not_ours, **self.variables(rank, str(port)), **own}

    def described(self) -> str:
        """The command line of each worker, as a shell takes it; the port is found when they are started."""
        from disttrain.recipe.once import variables as recipe_variables

        lines = []
        for rank in range(self.size):
            set_for_it = self.variables(rank, "PORT") | recipe_variables()
            variables = [f"{name}={shlex.quote(value)}" for name, value in set_for_it.items()]
            lines.append(" ".join(["env", *variables, shlex.join([sys.executable, *self.arguments])]))
        return "\n".join(lines)

    def variables(self, rank: int, port: str) -> dict[str, str]:
        """What is set for a worker; where it is not part of the contract, the user's setting wins."""
        defaults = {
            "OMP_NUM_THREADS": str(max(1, usable_cores() // self.size)),
            "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves its stack in the log
            "PYTHONUNBUFFERED": "1",  # the log of a killed worker is complete
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # of a peer that is gone or hangs, it warns again and again
            **({DEVICE: "cuda"} if isinstance(self.size, OnePerGpu) else {}),
        }
        contract = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            LAUNCHED_BY: LAUNCHER,
        }
        return {name: value for name, value in defaults.items() if name not in os.environ} | contract
