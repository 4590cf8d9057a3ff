"""What the test process sends to the fork server and the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What is imported only when it is first needed: making an optimizer imports torch._dynamo, which is 1.2 s of work.
# A worker reports which of these it has imported, and the fork server imports them for the workers to come.
LATE_IMPORTS = (
    "coverage",
    "disttrain.training.loop",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.export",
)


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a fresh worker needs to take its place in a group."""

    rank: int
    world_size: int
    env: dict[str, str]  # the whole environment, RANK and its kin included
    cwd: str
    sys_path: list[str]
    timeout_s: float
    process_group: bool
    host: tuple[str, str, str] | None = None  # of the simulated machine: network namespace, name, address book
    preload: Preload | None = None  # what the fork server could not import for it


@dataclass(frozen=True)
class ModulePreload:
    """Have this module imported before workers are forked."""

    module: str
    cwd: str
    sys_path: tuple[str, ...] = field(compare=False)
    env: dict[str, str] = field(compare=False)


@dataclass(frozen=True)
class PytestPreload:
    """Have this test file collected, as the pytest session at home did, before workers are forked."""

    session: int  # distinguishes sessions in the same process
    path: str  # the test file
    rootdir: str
    inifile: str | None
    cwd: str
    plugins: tuple[str, ...]  # the session's own -p options
    options: dict[str, Any] = field(compare=False)
    sys_path: tuple[str, ...] = field(compare=False)
    env: dict[str, str] = field(compare=False)
    workerinput: dict[str, Any] = field(compare=False)


Preload = ModulePreload | PytestPreload
