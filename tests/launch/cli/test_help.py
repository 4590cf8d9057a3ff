"""Help comes at once: it waits for no package that only workers need."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-c", "from disttrain_launch.cli import main; main()"]


def test_within_150_milliseconds() -> None:
    """Or, on a slow machine, within three times what Python and click alone take."""

    def seconds(*command: str) -> float:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began

    # The quickest: what others do on the machine is not the question.
    quickest = min(seconds(*COMMAND, "--help") for _ in range(8))
    assert quickest < 0.15 or quickest < 3 * min(seconds(sys.executable, "-c", "import click") for _ in range(8))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("train", "runs", "evaluate", "predict", "doctor")), ["--version"]],
)
def test_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from disttrain_launch.cli import main; main(standalone_mode=False)\n"
        "sys.exit(', '.join({'torch', 'pydantic', 'numpy', 'mlflow', 'rich'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
