"""Whole runs on tables: the same bits at every number of workers and after a resume, and answers from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import disttrain
from disttrain.testing import run_workers
from tests.disttrain.parallel.exact_runs import outcome
from tests.disttrain.task.test_tabular import people

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "regression-dropout-accumulation": (
        "regression",
        {"model": {"options": {"widths": [8], "dropout": 0.3}}, "train": {"accumulate": 3}},
    ),
    "classification-bf16": ("classification", {"model": {"options": {"widths": [8]}}, "train": {"precision": "bf16"}}),
}


def train(run_dir: Path, job: str, max_steps: int = 1000) -> disttrain.Result:
    """70 rows in batches of 16: the last one has 6, so that slices and their parts come in several sizes."""
    kind, sections = JOBS[job]
    sets = people(kind)
    recipe = {
        "task": {"name": "tabular"},
        "data": {"batch_size": 16},
        "model": {"name": "mlp", **sections["model"]},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {
            "epochs": 1,
            "log_every_steps": 1,
            "eval_batch_size": 8,
            "threads": 1,
            **sections["train"],
            "max_steps": max_steps,
        },
        "parallel": {"exact": True},
        "tracking": {"uri": "none", "system_metrics": False},
    }
    return disttrain.train(recipe, train_set=sets.train, test_set=sets.test, run_dir=run_dir)


@pytest.mark.parametrize("job", JOBS)
def test_every_number_of_workers_gives_the_same_bits_also_across_a_resume(tmp_path: Path, job: str) -> None:
    run_workers(train, 1, args=(tmp_path / "1", job), process_group=False)
    run_workers(train, 2, args=(tmp_path / "2", job, 2), process_group=False)
    run_workers(train, 3, args=(tmp_path / "2", job), process_group=False)
    alone, resumed = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    assert (resumed.weights, resumed.evaluation) == (alone.weights, alone.evaluation)
