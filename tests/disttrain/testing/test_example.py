"""The example project, run as its README says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "test_your_own_code"


def run(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=480, check=False).stdout


def test_the_harness_catches_the_planted_bugs(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    told = run(folder, "--runxfail")
    assert "2 failed, 14 passed" in told
    assert "assert [0, 2, 4, 6, 8, 10] == [0, 3, 6, 9, 12, 15]" in told
    for rank in (0, 1):
        assert re.search(rf"rank {rank} was in send\(int64 \[3\], dst={1 - rank}\) for .* at ring.py:\d+ in", told)
