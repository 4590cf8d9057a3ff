"""PyTorch's compiler is imported by runs that compile, and makes no difference to the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, disttrain
recipe = {"name": "small", "data": {"dataset": "digits", "batch_size": 8}, "model": {"name": "net"},
          "train": {"max_steps": 2, "device": "cpu"}, "tracking": {"uri": "none"}, "parallel": {"strategy": "none"}}
disttrain.train(recipe, run_dir="without")
print("torch._dynamo" in sys.modules)
import torch._dynamo
disttrain.train(recipe, run_dir="with")
"""


def test_a_run_that_compiles_nothing_does_without_the_compiler(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "False" in done.stdout.splitlines()
    runs = [tmp_path / name / "checkpoints" / "step-00000002" for name in ("without", "with")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
