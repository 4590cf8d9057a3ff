"""The checks for a GPU, tried on the CPU: that they run, and skip what only a GPU can show."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu import checks, fast
from tests.gpu.registry import CHECKS, ROOT, Answer, SkippedError

CHEAP = [checks.facts, checks.finite_check_of_every_type, checks.sums_of_integers_are_those_of_the_cpu,
         checks.batches_are_those_of_the_cpu, fast.orthogonalised_matrices_are_near_those_of_the_cpu]  # fmt: skip


@pytest.mark.parametrize("function", CHEAP, ids=lambda function: function.__name__)
def test_a_check_passes_on_the_cpu(function: Callable[[], Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(function(), dict)


def test_what_needs_a_gpu_is_skipped_without_one() -> None:
    with pytest.raises(SkippedError):
        CHECKS["a_kernel_that_never_ends_is_ended"].function()


@pytest.mark.long
def test_all_of_them_run_in_one_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    num = sum(not one.several for one in CHECKS.values())
    assert f"{num} checks, 0 failed" in done.stdout
