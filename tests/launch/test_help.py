"""Help comes at once: it waits for no package that only workers need."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-c", "from disttrain_launch.cli import main; main()"]


def test_within_150_milliseconds() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(8)) < 0.15  # the quickest: what others do on the machine is not the question


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["runs", "--help"], ["--version"]])
def test_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from disttrain_launch.cli import main; main(standalone_mode=False)\n"
        "sys.exit(', '.join({'torch', 'pydantic', 'numpy', 'mlflow', 'rich'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
