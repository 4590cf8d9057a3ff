"""The built wheel, installed in a clean environment outside the checkout, does what the checkout does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = (
    "pytest-asyncio", "pytest-cov", "pytest-json-report", "pytest-mock", "pytest-randomly", "pytest-rerunfailures",
    "pytest-sugar",
)  # fmt: skip
pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel and its dependencies, and nothing of the checkout."""

    wheel: Path
    bin: Path
    folder: Path

    def run(self, *command: str, timeout_s: float = 180) -> str:
        """Run a program of the environment in an empty folder; its standard output."""
        environment = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.folder,
            env=environment | {"PATH": f"{self.bin}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Builds the source distribution, the wheel from that, and installs the wheel."""
    base = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(base / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (base / "dist").glob("*.whl")
    venv.create(base / "venv", with_pip=True)
    binaries = base / "venv" / "bin"
    install = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"{wheel}[test]"]
    subprocess.run([binaries / "python", *install], check=True, timeout=1200)
    (base / "empty").mkdir()
    yield Installed(wheel, binaries, base / "empty")
    shutil.rmtree(base)  # gigabytes, and pytest would keep those of the last three runs


def test_it_holds_both_packages_their_data_and_nothing_else(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"disttrain", "disttrain_launch", "disttrain-0.1.0.dist-info"}
    tracked = subprocess.run(
        ["git", "ls-files", "disttrain", "launch", "k8s"], cwd=ROOT, capture_output=True, text=True
    )
    for name in tracked.stdout.split():
        expected = name.removeprefix("launch/") if name.startswith("launch/") else name
        assert expected.replace("k8s/", "disttrain_launch/k8s/") in names
    assert "disttrain-0.1.0.dist-info/licenses/LICENSE" in names


def test_its_dependencies_agree(installed: Installed) -> None:
    assert installed.run("python", "-m", "pip", "check").strip() == "No broken requirements found."


def test_it_is_not_the_checkout(installed: Installed) -> None:
    code = "import disttrain, disttrain_launch; print(disttrain.__file__); print(disttrain_launch.__file__)"
    for path in installed.run("python", "-c", code).split():
        assert Path(path).is_relative_to(installed.bin.parent)


def test_recipes_and_manifests_come_with_it(installed: Installed) -> None:
    recipes = json.loads(installed.run("disttrain", "recipe", "list", "--json"))["recipes"]
    assert {recipe["name"] for recipe in recipes} == {path.stem for path in ROOT.glob("disttrain/recipes/*.toml")}
    code = (
        "from importlib.resources import files; print(*(p.name for p in (files('disttrain_launch') / 'k8s').iterdir()))"
    )
    assert set(installed.run("python", "-c", code).split()) == {path.name for path in (ROOT / "k8s").iterdir()}


def test_it_renders_the_manifests_of_the_checkout(installed: Installed) -> None:
    rendered = installed.run("disttrain", "k8s", "render", "digits", "--nodes", "2", "--image", "disttrain:latest")
    assert rendered == (ROOT / "tests/launch/kubernetes/golden/base.yaml").read_text()


def test_it_trains_evaluates_and_shows(installed: Installed) -> None:
    installed.run("disttrain", "train", "digits", "-n", "2", "--run-dir", "run")
    evaluation = json.loads(installed.run("disttrain", "evaluate", "run", "-n", "3", "--json"))
    assert evaluation["total"] == 360
    assert evaluation["accuracy"] >= 0.97
    assert json.loads(installed.run("disttrain", "runs", "show", "run", "--json"))["world_size"] == 2
    assert len(installed.run("disttrain", "runs", "hash", "run").strip()) == 64


def test_the_example_project_tests_its_own_code_with_it(installed: Installed) -> None:
    project = shutil.copytree(ROOT / "examples" / "test_your_own_code", installed.folder / "project")
    out = installed.run("python", "-m", "pytest", "-q", str(project), "--rootdir", str(project))
    assert "14 passed, 2 xfailed" in out


@pytest.mark.parametrize("options", [("--force-sugar",), ("-n", "2")], ids=["alone", "xdist"])
def test_other_plugins_of_pytest_work_with_it(installed: Installed, options: tuple[str, ...], tmp_path: Path) -> None:
    """The last of this file: it installs what changes how every pytest runs."""
    install = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *PLUGINS]
    subprocess.run([installed.bin / "python", *install], check=True, timeout=600)
    source = ROOT / "tests" / "disttrain" / "testing" / "project_with_plugins"
    project = shutil.copytree(source, tmp_path / "project")
    report, coverage = tmp_path / "report.json", tmp_path / "coverage.json"
    command = ["python", "-m", "pytest", str(project), "--rootdir", str(project), f"--cov={project}"]
    reports = ["--json-report", "--json-report-file", str(report), f"--cov-report=json:{coverage}"]
    installed.run(*command, *reports, *options)
    summary = json.loads(report.read_text())["summary"]
    assert (summary["total"], summary["passed"], summary["rerun"]) == (7, 6, 1)  # which has passed in the end
    (missing,) = [
        file["missing_lines"] for path, file in json.loads(coverage.read_text())["files"].items() if "measured" in path
    ]
    assert missing[-1] == 15
    assert len(missing) == 2 or "-n" in options  # pytest-cov's no_cover leaves one of its two measurements running
