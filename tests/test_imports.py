"""Imports go one way, from the ground up, and what needs no torch imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKER, LAUNCH = ROOT / "disttrain", ROOT / "launch" / "disttrain_launch"

# What each room of disttrain may import from disttrain, besides itself and `errors`.
LAYERS = {
    "__init__": {"recipe", "task", "training"},
    "__main__": {"health", "terminal", "training", "worker"},
    "errors": set(),
    "faultpoints": set(),
    "files": set(),
    "layout": set(),
    "rng": set(),
    "terminal": set(),
    "recipe": set(),
    "distributed": set(),
    "data": {"distributed", "recipe", "rng"},
    "models": {"distributed", "recipe"},
    "task": {"data", "distributed", "models", "recipe", "rng"},
    "parallel": {"distributed", "recipe", "rng"},
    "checkpoint": {"distributed"},
    "runs": {"distributed", "recipe"},
    "remote": {"checkpoint", "recipe", "runs"},
    "tracking": {"__version__", "distributed", "recipe", "runs"},
    "health": {"data", "distributed", "models", "parallel", "recipe", "rng", "runs", "task"},
    "training": {
        "checkpoint", "data", "distributed", "health", "models", "parallel", "recipe", "remote", "rng",
        "runs", "task", "terminal", "tracking",
    },
    "worker": {"distributed", "health", "recipe", "terminal"},
    "agent": {"__version__", "checkpoint", "distributed", "health", "recipe", "remote", "runs", "terminal", "tracking"},
    "commands": {
        "checkpoint", "data", "distributed", "doctor", "models", "parallel", "recipe", "remote", "runs",
        "task", "tracking", "training", "worker",
    },
    "doctor": {"data", "distributed", "recipe", "runs", "tracking"},
    "testing": {"distributed"},
}  # fmt: skip
# The ground floor: what cannot be imported too early, and costs nothing.
ANYWHERE = {"errors", "faultpoints", "files", "layout"}

# What takes seconds to import, and is what may be broken on a machine that only launches.
HEAVY = ("torch", "numpy", "mlflow")

# What a room never does, as the packages it never imports.
NEVER = {
    "__init__": {"torch", "pydantic"},
    "errors": {"torch", "pydantic"},
    "layout": {"torch", "pydantic"},
    "recipe": {"torch", "click"},
    "runs": {"torch", "mlflow", "click"},
    "terminal": {"torch", "mlflow", "click"},
    "distributed": {"mlflow", "click"},
    "data": {"torch.distributed", "mlflow", "click"},
    "models": {"torch.distributed", "mlflow", "click"},
    "task": {"torch.distributed", "mlflow", "click"},
    "parallel": {"torch.optim", "mlflow", "click"},
    "checkpoint": {"pickle", "torch.distributed", "mlflow", "click"},
    "tracking": {"torch.distributed", "click"},
    "training": {"click"},
    "doctor": {"click"},
}


def rooms() -> list[str]:
    """The modules and packages directly under disttrain."""
    return sorted({path.relative_to(WORKER).parts[0].removesuffix(".py") for path in WORKER.rglob("*.py")})


def files_of(room: str) -> list[Path]:
    """The files of a room."""
    folder = WORKER / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [WORKER / f"{room}.py"]


@cache
def imports(path: Path) -> list[str]:
    """The dotted names that a file imports, at its top or anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


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


def test_launchers_import_nothing_that_needs_torch() -> None:
    """Neither themselves nor by what they take from disttrain, at the top of a file or when they come to it."""
    found = {name for path in LAUNCH.rglob("*.py") for name in imports(path)}
    assert not any(is_or_is_in(name, package) for name in found for package in HEAVY)
    names = sorted(name for name in found if is_or_is_in(name, "disttrain"))
    assert len(names) > 20
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError: importlib.import_module(name.rpartition('.')[0])\n"
        f"sys.exit(', '.join({set(HEAVY)} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"what launchers import from disttrain imports {done.stderr}"


def test_only_world_reads_who_a_worker_is_and_starts_the_process_group() -> None:
    for path in WORKER.rglob("*.py"):
        place = path.relative_to(WORKER)
        # faultpoints only notes the rank in its record
        if place.stem in ("world", "launched", "faultpoints") or place.parts[0] == "testing":
            continue
        text = path.read_text(encoding="utf-8")
        for words in ("init_process_group", '"RANK"', '"LOCAL_RANK"', '"WORLD_SIZE"', '"MASTER_ADDR"'):
            assert words not in text, f"{path.relative_to(ROOT)} has {words}"


@pytest.mark.parametrize(
    "module",
    [
        "disttrain", "disttrain.recipe", "disttrain.commands.runs", "disttrain.runs.summary",
        "disttrain_launch.local.workers", "disttrain_launch.cli",
    ],
)  # fmt: skip
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'numpy', 'mlflow'}} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
