"""Imports go one way, from the ground up, and what needs no torch imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKER, LAUNCH = ROOT / "disttrain", ROOT / "launch" / "disttrain_launch"

# What each room of disttrain may import from disttrain, besides itself and `errors`.
LAYERS = {
    "__init__": {"recipe", "train"},
    "__main__": {"guard", "output", "train", "worker"},
    "errors": set(),
    "recipe": {"home", "layout"},
    "faultpoints": set(),
    "files": set(),
    "layout": set(),
    "launched": set(),
    "fixed_point": set(),
    "reference": set(),
    "rng": set(),
    "bar": {"output"},
    "console": {"bar"},
    "conditions": {"recipe"},
    "buffers": set(),
    "diagnosis": {"data", "recipe", "rng"},
    "spikes": {"recipe", "rundir"},
    "finite": {"buffers", "collectives", "data", "diagnosis", "parallel", "recipe", "world"},
    "guard": {"launched"},
    "suspended": set(),
    "lock": set(),
    "log": set(),
    "output": set(),
    "home": set(),
    "affinity": set(),
    "cores": set(),
    "device": set(),
    "world": {"affinity", "cores", "device", "launched"},
    "rundir": {"launched", "lock", "log", "recipe"},
    "collectives": {"fixed_point", "world"},
    "handout": {"checkpoint", "collectives", "world"},
    "data": {"cores", "recipe", "reference", "rng", "world"},
    "models": {"buffers", "recipe", "reference"},
    "optim": {"recipe"},
    "sync_batchnorm": {"collectives"},
    "exact": {"collectives", "fixed_point", "world"},
    "ddp": {"collectives", "world"},
    "parallel": {"collectives", "ddp", "exact", "recipe", "sync_batchnorm", "world"},
    "checkpoint": {"layout"},
    "remote": {"checkpoint", "layout", "recipe", "rundir"},
    "tracking": {"__version__", "home", "recipe"},
    "identity": {"data", "optim"},
    "evaluate": {"buffers", "collectives", "data", "rng"},
    "progress": set(),
    "report": {"launched"},
    "watchdog": {"collectives", "progress", "world"},
    "worker": {"guard", "home", "launched", "output", "report"},
    "agent": {
        "checkpoint", "guard", "layout", "output", "recipe", "remote", "report", "rundir", "suspended", "tracking",
    },
    "trial": {"buffers", "collectives", "data", "job", "rng"},
    "job": {
        "checkpoint", "collectives", "conditions", "data", "finite", "handout", "identity", "models", "optim",
        "parallel", "progress", "recipe", "rng", "spikes", "world",
    },
    "resume": {
        "checkpoint", "collectives", "conditions", "exact", "fixed_point", "handout", "identity", "job",
    },
    "state_check": {"checkpoint", "job", "optim"},
    "model_check": {"buffers", "data", "job", "rng", "trial"},
    "saver": {"checkpoint", "collectives", "console", "job", "layout", "rundir", "tracking"},
    "bookkeeper": {
        "checkpoint", "collectives", "console", "diagnosis", "evaluate", "finite", "guard", "job", "rundir",
        "saver", "spikes", "tracking",
    },
    "conclusion": {"console", "guard", "job", "launched", "rundir", "spikes", "tracking", "world"},
    "session": {
        "bookkeeper", "checkpoint", "collectives", "conclusion", "conditions", "console", "guard", "job",
        "launched", "model_check", "progress", "recipe", "remote", "report", "resume", "rundir", "spikes",
        "state_check", "tracking", "trial", "watchdog", "world",
    },
    "train": {
        "bookkeeper", "conditions", "data", "finite", "guard", "job", "model_check", "optim", "recipe", "rng",
        "session", "spikes", "world",
    },
    "commands": {
        "checkpoint", "collectives", "conditions", "data", "doctor", "evaluate", "handout", "identity", "job", "layout",
        "models", "recipe", "remote", "rundir", "tracking", "worker", "world",
    },
    "doctor": {"collectives", "cores", "data", "lock", "recipe", "tracking", "world"},
    "testing": set(),
}  # fmt: skip
# Points where a test may injure the product cost nothing unarmed, and any room may have files to open.
ANYWHERE = {"errors", "faultpoints", "files"}

# What launchers share with workers.
KNOWN_TO_LAUNCHERS = ("recipe", "cores", "output", "suspended")

# What a room never does, as the packages it never imports.
NEVER = {
    "__init__": {"torch", "pydantic"},
    "errors": {"torch", "pydantic"},
    "cores": {"torch"},
    "suspended": {"torch"},
    "recipe": {"torch", "click"},
    "collectives": {"mlflow", "click"},
    "data": {"torch.distributed", "mlflow", "click"},
    "models": {"torch.distributed", "mlflow", "click"},
    "optim": {"torch.distributed", "os", "mlflow", "click"},
    "parallel": {"torch.optim", "mlflow", "click"},
    "checkpoint": {"pickle", "torch.distributed", "mlflow", "click"},
    "tracking": {"torch.distributed", "click"},
    "doctor": {"click"},
    "evaluate": {"mlflow", "click"},
    "train": {"os", "mlflow", "click"},
}


def rooms() -> list[str]:
    """The modules and packages directly under disttrain."""
    return sorted({path.relative_to(WORKER).parts[0].removesuffix(".py") for path in WORKER.rglob("*.py")})


def files_of(room: str) -> list[Path]:
    """The files of a room."""
    folder = WORKER / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [WORKER / f"{room}.py"]


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_or_is_in(name: str, package: str) -> bool:
    """Whether `name` is the package or something in it."""
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    assert room in LAYERS, f"{room} has no place yet: say in LAYERS what it may import"
    allowed = LAYERS[room] | ANYWHERE | {room}
    for path in files_of(room):
        for name in imports(path):
            if is_or_is_in(name, "disttrain"):
                assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_layers_have_no_cycle_and_name_no_ghosts() -> None:
    assert set(LAYERS) <= set(rooms())
    standing: set[str] = {"__version__"}
    while rest := set(LAYERS) - standing:
        ground = {room for room in rest if LAYERS[room] - {room} <= standing}
        assert ground, f"a cycle among {sorted(rest)}"
        standing |= ground


@pytest.mark.parametrize("room", NEVER)
def test_what_a_room_never_imports(room: str) -> None:
    for path in files_of(room):
        for name in imports(path):
            for package in NEVER[room]:
                assert not is_or_is_in(name, package), f"{path.relative_to(ROOT)} imports {name}"


def test_workers_know_nothing_of_launchers() -> None:
    for path in WORKER.rglob("*.py"):
        assert not any(is_or_is_in(name, "disttrain_launch") for name in imports(path)), path


def test_launchers_know_only_what_needs_no_torch() -> None:
    for path in LAUNCH.rglob("*.py"):
        for name in imports(path):
            assert not any(is_or_is_in(name, package) for package in ("torch", "mlflow", "numpy")), f"{path}: {name}"
            if is_or_is_in(name, "disttrain"):
                assert any(is_or_is_in(name, f"disttrain.{room}") for room in KNOWN_TO_LAUNCHERS), f"{path}: {name}"


def test_only_world_reads_who_a_worker_is_and_starts_the_process_group() -> None:
    for path in WORKER.rglob("*.py"):
        room = path.relative_to(WORKER).parts[0].removesuffix(".py")
        if room in ("world", "launched", "testing", "faultpoints"):  # faultpoints only notes the rank in its record
            continue
        text = path.read_text(encoding="utf-8")
        for words in ("init_process_group", '"RANK"', '"LOCAL_RANK"', '"WORLD_SIZE"', '"MASTER_ADDR"'):
            assert words not in text, f"{path.relative_to(ROOT)} has {words}"


@pytest.mark.parametrize(
    "module",
    [
        "disttrain", "disttrain.recipe", "disttrain.commands.runs", "disttrain.commands.summary",
        "disttrain_launch.local", "disttrain_launch.cli",
    ],
)  # fmt: skip
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'numpy', 'mlflow'}} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
