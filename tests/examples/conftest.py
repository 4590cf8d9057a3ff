"""A copy of an example's folder, with what it trains."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Copies the folder of a field and makes it the current one; afterwards its modules are gone."""

    def copy(field: str) -> Path:
        folder = tmp_path / field
        made = shutil.ignore_patterns("__pycache__", "runs", "pictures", "recordings")
        shutil.copytree(EXAMPLES / field, folder, ignore=made)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        return folder

    before = set(sys.modules)
    yield copy
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def promised() -> Callable[[str, str], tuple[str, dict[str, float]]]:
    """The command of a field's README that trains a recipe, and the metrics in the last line that it shows."""

    def read(field: str, recipe: str) -> tuple[str, dict[str, float]]:
        readme = (EXAMPLES / field / "README.md").read_text(encoding="utf-8")
        (command,) = re.findall(rf"^(.*disttrain train {re.escape(recipe)} .*)$", readme, re.MULTILINE)
        (last,) = re.findall(rf"disttrain train {re.escape(recipe)} (?:.*\n)*?epoch (\d+)/\1: (.*), …\n", readme)
        found = re.findall(r"(\w+) ([\d.]+)(%?)", last[1])
        return command, {name: float(number) / (100 if percent else 1) for name, number, percent in found}

    return read
