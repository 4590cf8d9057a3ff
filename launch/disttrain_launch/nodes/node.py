"""What one machine of several runs, as a value."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disttrain.distributed.cores import usable_cores
from disttrain.distributed.gpus import OnePerGpu
from disttrain.distributed.launched import NODE_LAUNCHER
from disttrain.layout import DEVICE, LAUNCHED_BY
from disttrain_launch.local.group import module_arguments

DEFAULT_PORT = 29400
JOIN_S = 600.0
"""How long a machine waits for the others."""


@dataclass(frozen=True)
class Node:
    """This machine's part of a job on several.

    Args:
        arguments: what follows the interpreter on each worker's command line.
        nodes: the minimum and maximum number of machines.
        host, port: where they meet.
        workers: how many workers this one runs; an `OnePerGpu` has each use its GPU.
        run_dir: where the run lives.
        serves: whether the store of the rendezvous is on this machine; None where that is unknown.
        address: by which the others reach this one.
        max_restarts: how often the workers are restarted after failures.
        job_id: the same on all machines; it distinguishes jobs that share a store.
        grace_s: how long workers that are asked to stop may take to save.
        continues: whether a lost worker or machine is to cost no restart.
        stops: whether it is to end the run on all machines.
        max_losses: how often it may continue within some minutes.
        most_workers: as many as can share a step; 0 for any number.
        recipe, overrides: what is trained, by which a node knows whether a run that is finished has more to do.
        terms: what has to be the same on all machines, see `agreement`.
    """

    arguments: tuple[str, ...]
    nodes: tuple[int, int]
    host: str
    port: int
    workers: int
    run_dir: str
    serves: bool | None
    address: str | None
    max_restarts: int
    job_id: str
    grace_s: int
    recipe: str
    overrides: tuple[str, ...]
    continues: bool = False
    stops: bool = False
    max_losses: int = 0
    most_workers: int = 0
    terms: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_on_gpus(self) -> bool:
        """Whether its workers were asked to use GPUs, each its own."""
        return isinstance(self.workers, OnePerGpu) or os.environ.get(DEVICE) == "cuda"

    @property
    def _is_led(self) -> bool:
        """Whether one machine sees what becomes of the workers of all, and judges; else each runs torchrun's agent."""
        return self.continues or self.stops

    def command(self) -> list[str]:
        """The agent's command line."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return [
            sys.executable, *module_arguments("disttrain.agent"),
            "--nodes", *map(str, self.nodes),
            "--rendezvous", f"{host}:{self.port}",
            "--serves", "unknown" if self.serves is None else str(self.serves).lower(),
            *(["--local-addr", self.address] if self.address else []),
            "--workers", str(self.workers),
            "--max-restarts", str(self.max_restarts),
            "--job-id", self.job_id,
            "--stop-grace", str(self.grace_s),
            "--run-dir", self.run_dir,
            "--recipe", self.recipe,
            *(f"--override={override}" for override in self.overrides),
            "--", *self.arguments,
        ]  # fmt: skip

    def variables(self) -> dict[str, str]:
        """What is set in its environment; the user's settings win, but for what started the workers."""
        defaults = {
            "OMP_NUM_THREADS": str(max(1, usable_cores() // self.workers)),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **({DEVICE: "cuda"} if isinstance(self.workers, OnePerGpu) else {}),
        }
        interface = interface_of(self.address) if self.address else None
        if interface is not None:
            # NCCL takes a bare name for the beginning of one: eth1 would be eth10, too.
            defaults |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
        unset = {name: value for name, value in defaults.items() if name not in os.environ}
        return {**unset, LAUNCHED_BY: NODE_LAUNCHER}

    def described(self) -> str:
        """What `run` would do, as a shell takes it."""
        from disttrain.recipe.once import variables as recipe_variables

        set_for_it = self.variables() | recipe_variables()
        variables = [f"{name}={shlex.quote(value)}" for name, value in set_for_it.items()]
        if not self._is_led:
            return " ".join(["env", *variables, shlex.join(self.command())])
        line = " ".join(["env", *variables, shlex.join([sys.executable, *self.arguments])])
        return "\n".join([line] * self.workers)  # each with the place that it is given once all have met

    def become(self) -> None:
        """Replace this process by the agent: one process, so signals and its exit code need no forwarding."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._is_led:
            from disttrain_launch.nodes.together import run_together

            os.environ.update(self.variables())
            run_together(self)
        command = self.command()
        os.execve(command[0], command, {**os.environ, **self.variables()})


def parse_nodes(text: str) -> tuple[int, int]:
    """(minimum, maximum) of "N" or "MIN:MAX". Raises ValueError with what is wrong."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a valid number of nodes; give N, or MIN:MAX")
    least, greatest = int(match[1]), int(match[2] or match[1])
    if not 1 <= least <= greatest:
        raise ValueError(f"{text!r}: at least 1 node is needed, and MIN must not be more than MAX")
    return least, greatest


def parse_rendezvous(text: str) -> tuple[str, int]:
    """(host, port) of "HOST[:PORT]". Raises ValueError with what is wrong."""
    match = re.fullmatch(r"\[(?P<v6>[0-9a-fA-F:.]+)\](?::(?P<p6>\d+))?|(?P<host>[^:\s/]+)(?::(?P<port>\d+))?", text)
    if match is None:
        raise ValueError(
            f"{text!r} is not of the form HOST:PORT; give the address of one machine, such as node-0:{DEFAULT_PORT}"
        )
    port = int(match["p6"] or match["port"] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise ValueError(f"{text!r}: a port is a number from 1 to 65535")
    host = match["v6"] or match["host"]
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"{text!r}: {host!r} is not a valid name of a machine") from None
    return host, port


def own_addresses() -> dict[str, str]:
    """The addresses of this machine, and the interface that has each."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]: interface
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    }


def interface_of(address: str) -> str | None:
    """The network interface that has this address (or name) of this machine; None if none has."""
    addresses = own_addresses()
    return next((addresses[one] for one in resolve(address) if one in addresses), None)


def resolve(host: str) -> list[str]:
    """The addresses of a name, the name itself if it is one; none if it is unknown."""
    try:
        return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, None)))
    except OSError:
        return []


def address_towards(host: str, port: int) -> str | None:
    """The address of this machine from which a connection to `host` would come; None if there is no way there."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
            try:
                probe.connect((host, port))
                return str(probe.getsockname()[0])
            except OSError:
                continue
    return None
