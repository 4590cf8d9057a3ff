"""What the tests of the examples share: a few steps in this process, and the whole command of a README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import disttrain
from disttrain.runs.journal import read_journal

QUIET = ("tracking.uri=none", "tracking.system_metrics=false")


def few_steps(recipe: str, num_steps: int, *overrides: str) -> tuple[list[float], dict[str, float]]:
    """Train in this process; the losses of the steps, and the metrics of the evaluation after the last."""
    given = (f"train.max_steps={num_steps}", "train.log_every_steps=1", "train.threads=1", *QUIET, *overrides)
    result = disttrain.train(recipe, overrides=given, run_dir=Path("runs/few"))
    assert result.step == num_steps
    records = [one["metrics"] for one in read_journal(result.run_dir / "journal.jsonl") if one["kind"] == "metrics"]
    return [metrics["train/loss"] for metrics in records if "train/loss" in metrics], result.metrics


def shell(command: str) -> str:
    """What a README's command line prints, with this environment's programs."""
    path = f"{Path(sys.executable).parent}"
    done = subprocess.run(
        ["bash", "-c", f'PATH="{path}:$PATH"; {command}'], capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def final_metrics(command: str) -> dict[str, float]:
    """Train by a README's command, and evaluate what came of it with one worker."""
    shell(f"{command} --run-dir runs/whole -o tracking.uri=none")
    metrics: dict[str, float] = json.loads(shell("disttrain evaluate runs/whole --trust --json"))["metrics"]
    return metrics


def same_bits(recipe: str) -> bool:
    """Whether 1, 2 and 3 workers, and a kill, give the same bits."""
    found: bool = json.loads(shell(f"disttrain prove {recipe} --workers 1,2,3 --kills 1 --steps 12 --json"))["same"]
    return found
