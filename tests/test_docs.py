"""The programs in the documentation run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import disttrain

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_program_of_the_python_page_trains(tmp_path: Path) -> None:
    program = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    assert "Sequential (650 parameters) on the sets given (1,400 training, 397 test samples)" in done.stdout
    accuracy, run_dir = done.stdout.splitlines()[-1].split()
    assert (float(accuracy) > 0.5, run_dir) == (True, str(tmp_path / "runs/mine"))


def test_the_model_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    (name,) = re.findall(r"disttrain train digits -n 2 -o (model\.name=\S+)", readme)
    (tmp_path / "my_net.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [name, "train.max_steps=3", "train.threads=1", "tracking.uri=none", "tracking.system_metrics=false"]
    assert disttrain.train("digits", overrides=overrides, run_dir=tmp_path / "run").step == 3
    assert len([line for line in program.splitlines() if line]) <= 15


def test_what_the_readme_points_to_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^):]+)\)", readme)
    assert len(places) > 10
    assert [place for place in places if not (ROOT / place).is_file()] == []
