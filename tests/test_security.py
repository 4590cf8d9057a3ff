"""What docs/security.md promises of the sources: nothing unpickles, and no archive is unpacked blindly."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain_launch.local.group import module_arguments

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "disttrain").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# Calls that run what they read, or follow an archive out of its folder.
DANGEROUS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "dill.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "torch.load", "numpy.load",
    "torch.export.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "numpy.lib.format.read_array", "mlflow.pytorch.load_model", "mlflow.pyfunc.load_model", "pandas.read_pickle",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system",
    "tempfile.mktemp", "extract_archive", "download_and_extract_archive", "shutil.unpack_archive", "extractall",
    "extract",
}  # fmt: skip
ALLOWED = {
    # The plugin talks to its own workers through sockets that have no name; see docs/security.md.
    "disttrain/testing": {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads"},
    # With a filter that refuses whatever is not a plain file within the folder; see test_archive.py.
    "disttrain/data/sources/archive.py": {"extractall"},
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute; `?` stands for what is neither."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """What a file calls or derives classes from, as it was imported, with the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    origin: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            head, _, rest = name.partition(".")
            full = f"{origin.get(head, head)}.{rest}".rstrip(".")
            yield full, node.lineno
            if (last := full.rpartition(".")[2]) in (
                "extractall",
                "extract",
                "extract_archive",
                "download_and_extract_archive",
            ):
                yield last, node.lineno


def test_a_module_in_the_current_folder_takes_no_other_ones_place(tmp_path: Path) -> None:
    for name in ("click", "select", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    (tmp_path / "my_model.py").write_text("def other(): ...")
    words = ("digits", "-o", "model.name=my_model:net", "--run-dir", "run")
    command = [sys.executable, *module_arguments("disttrain", *words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 78
    assert "model.name: module 'my_model' has no 'net'" in done.stderr, (
        "what a recipe names is found there all the same"
    )


def test_no_module_is_run_with_the_current_folder_in_front() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple):
                words = [word.value for word in node.elts if isinstance(word, ast.Constant)]
                assert "-m" not in words or "-P" in words, f"{path}:{node.lineno}"


def test_nothing_runs_what_it_reads() -> None:
    found = []
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        allowed = {name for folder, names in ALLOWED.items() if place.startswith(folder) for name in names}
        found += [f"{place}:{line} calls {name}" for name, line in calls(path) if name in DANGEROUS - allowed]
    assert not found


# Where files of a run are opened, and what of it is done with new files, in new folders that no run holds.
OF_RUNS = ("agent", "checkpoint", "commands", "health", "runs", "tracking", "training")
OPENS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
IN_NEW_FOLDERS = {
    ("checkpoint/folder.py", "open"),
    ("tracking/mlflow/model.py", "read_bytes"),
    ("tracking/mlflow/model.py", "write_text"),
    ("tracking/export.py", "open"),
    ("tracking/export.py", "write_bytes"),
    ("tracking/export.py", "write_text"),
    ("tracking/mlflow/uploads.py", "open"),
}


def test_files_of_a_run_are_opened_by_what_follows_no_link() -> None:
    found = set()
    for room in OF_RUNS:
        place = ROOT / "disttrain" / room
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    whole = dotted(node.func)
                    name = whole.rpartition(".")[2]
                    is_imported = name != "open" and "." not in whole  # from disttrain.files, under the same name
                    if name in OPENS and not is_imported and whole != "os.open":
                        found.add((path.relative_to(ROOT / "disttrain").as_posix(), name))
    assert found <= IN_NEW_FOLDERS, "use disttrain.files"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import load as read\nread(f)",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "import tarfile\ntarfile.open(x).extractall(y)",
        "eval('1')",
    ],
)
def test_this_test_sees_it(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(source)
    assert [name for name, _ in calls(tmp_path / "a.py") if name in DANGEROUS]
