"""The programs in the documentation run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_program_of_the_python_page_trains(tmp_path: Path) -> None:
    program = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Sequential (650 parameters) on the sets given (1,400 training, 397 test samples)" in done.stdout
    accuracy, run_dir = done.stdout.splitlines()[-1].split()
    assert (float(accuracy) > 0.5, run_dir) == (True, str(tmp_path / "runs/mine"))
