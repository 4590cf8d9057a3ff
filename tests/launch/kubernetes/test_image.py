"""k8s/Dockerfile: what it says, and its RUN steps followed as far as a machine without an engine can."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from disttrain_launch.kubernetes import source

ROOT = Path(__file__).parents[3]
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """The instructions of each stage: (name, rest of the line); those before the first FROM are stage 0."""
    text = (ROOT / "k8s/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: list[list[Instruction]] = [[]]
    for line in lines:
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest.strip()))
    return found


def of(stage: list[Instruction], name: str) -> list[str]:
    """The instructions of that name."""
    return [rest for found, rest in stage if found == name]


def test_it_is_slim_pinned_unprivileged_and_has_no_source() -> None:
    _, wheel, image = stages()
    assert of(wheel, "FROM")[0].endswith("-slim AS wheel")
    assert of(image, "FROM")[0].endswith("-slim")
    for run in of(wheel, "RUN") + of(image, "RUN"):
        if "pip install" in run:
            assert re.search(r"-c \S*constraints\.txt", run), f"not pinned: {run}"
            assert "--no-cache-dir" in run
    # Of the checkout, the image itself gets nothing but the pins and the wheel.
    assert of(image, "COPY") == ["constraints.txt /tmp/constraints.txt", "--from=wheel /wheel /tmp/wheel"]
    assert "CUDA=cpu" in of(image, "ARG")
    assert of(image, "ENTRYPOINT") == ['["disttrain"]']
    assert of(image, "HEALTHCHECK")[0].endswith('CMD ["disttrain", "--version"]')
    names = [name for name, _ in image]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")


def test_its_user_and_folders_are_those_of_the_manifests() -> None:
    pod = source.base()["Job"]["spec"]["template"]["spec"]
    security, (container,) = pod["securityContext"], pod["containers"]
    image = stages()[2]
    assert of(image, "USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    assert of(image, "WORKDIR") == [container["workingDir"]]
    home = next(entry["value"] for entry in container["env"] if entry["name"] == "HOME")
    assert f"HOME={home}" in of(image, "ENV")[0]


def copied() -> list[str]:
    """What the first stage copies out of the checkout."""
    return [path for rest in of(stages()[1], "COPY") for path in rest.split()[:-1]]


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert kept == set(copied())
    assert all((ROOT / path).exists() for path in kept)
    assert any(fnmatch.fnmatch("disttrain/__pycache__", pattern) for pattern in lines[1:])


@pytest.mark.wheel
@pytest.mark.timeout(1800)
def test_its_steps_lead_to_a_working_command(tmp_path: Path) -> None:
    """Both stages in one folder as root and one environment as Python; users are made by an engine alone."""
    root, context = tmp_path / "root", tmp_path / "context"
    for path in copied():
        target = context / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / path, target)
    venv.create(tmp_path / "venv", with_pip=True)
    arguments = {"CUDA": "cpu", "PYTORCH_INDEX": "unused", "PACKAGES": "", "SYSTEM_PACKAGES": ""}
    for stage in stages()[1:]:
        folder = root
        for name, rest in stage:
            if name == "WORKDIR":
                folder = root / rest.strip("/")
                folder.mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                follow_copy(rest, context, root, folder)
            elif name == "RUN" and "useradd" not in rest:
                follow_run(rest, arguments, root, folder, tmp_path / "venv")
    disttrain = [str(tmp_path / "venv/bin/disttrain")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for words in (["--version"], ["k8s", "render", "digits", "--image", "disttrain:test"]):
        done = subprocess.run([*disttrain, *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    assert not list(root.glob("tmp/*")), "the last step cleans up"


def follow_copy(rest: str, context: Path, root: Path, folder: Path) -> None:
    """COPY, from the context or from the stage before."""
    words = rest.split()
    base = context
    if words[0].startswith("--from="):
        base, words = root, words[1:]
    for word in words[:-1]:
        target = root / words[-1].strip("/") if words[-1].startswith("/") else folder / words[-1]
        found = base / word.strip("/")
        if found.is_dir():
            shutil.copytree(found, target, dirs_exist_ok=True)
        else:
            target = target / found.name if words[-1].endswith("/") else target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, target)


def follow_run(rest: str, arguments: dict[str, str], root: Path, folder: Path, environment: Path) -> None:
    """RUN, with the image's root moved; PyTorch comes from the index that this machine uses."""
    command = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], rest)
    command = re.sub(r"--index-url \S+", "", command)
    command = re.sub(r"(?<= )/(tmp|wheel)(?=[/ ]|$)", lambda found: shlex.quote(str(root / found[1])), command)
    done = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{environment / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
