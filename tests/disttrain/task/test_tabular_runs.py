"""Whole runs on tables: the same bits at every number of workers and after a resume, and answers from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

import disttrain
from disttrain.commands import evaluate, predict
from disttrain.errors import ConfigurationError
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


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "task": {"name": "tabular"},
        "train": {"max_steps": 1, "device": "cpu", "threads": 1},
        "tracking": {"uri": "none", "system_metrics": False},
    }
    features = np.arange(80.0).reshape(20, 4)
    sets = {"train_set": (features, features.sum(1)), "test_set": [features[:5], features[:5].sum(1)]}
    with pytest.raises(ConfigurationError, match="'net' is for images, and the samples are rows of numbers: set it to"):
        disttrain.train(recipe, run_dir=tmp_path / "run", **sets)
    result = disttrain.train(recipe, overrides=["model.name=mlp"], run_dir=tmp_path / "run", **sets)
    assert set(result.metrics) == {"rmse", "mae", "r2", "loss"}
    with pytest.raises(ConfigurationError, match=r"the test set: give \(features, targets\), not 1 values"):
        disttrain.train(recipe, train_set=sets["train_set"], test_set=(features,), run_dir=tmp_path / "other")


def test_a_checkpoint_alone_predicts_the_rows_of_a_file_and_is_evaluated_on_another_table(tmp_path: Path) -> None:
    """What is standardised and which category is which is what it was in the rows that were trained on."""
    header, *rows = ["word,number,y", *(f"{'ab'[n % 2]},{n},{3 * n + 5 * (n % 2)}" for n in range(40))]
    (tmp_path / "all.csv").write_text("\n".join([header, *rows]))
    recipe = {
        "task": {"name": "tabular"},
        "data": {
            "dataset": "table",
            "batch_size": 4,
            "root": str(tmp_path),
            "options": {"file": "all.csv", "target": "y"},
        },
        "model": {"name": "mlp", "options": {"widths": []}},
        "optim": {"name": "adam", "lr": 0.1},
        "train": {"epochs": 20, "eval_every_epochs": 20, "threads": 1},
        "tracking": {"uri": "none", "system_metrics": False},
    }
    result = disttrain.train(recipe, run_dir=tmp_path / "run")
    assert result.metrics["r2"] > 0.99

    def run(command: click.Command, *words: str) -> Any:
        done = CliRunner().invoke(command, [str(tmp_path / "run"), "--json", *words], catch_exceptions=False)
        said.append(done.stderr)
        return json.loads(done.stdout)

    said: list[str] = []
    assert run(evaluate.command)["metrics"] == result.metrics
    few = [f"{number},{word},0" for number, word in ((30, "b"), (1, "a"), (2, "zebra"))]
    (tmp_path / "few.csv").write_text("\n".join(["number,word,y", *few]))
    other = run(evaluate.command, "-o", "data.options={train_file='few.csv', test_file='few.csv', target='y'}")
    (tmp_path / "all.csv").unlink()
    answers = run(predict.command, str(tmp_path / "few.csv"))["predictions"]
    assert said[-1] == (
        f"warning: {tmp_path}/few.csv: categories that training never saw count as none of those that it saw: "
        "1 of 3 rows in column 'word' ('zebra').\n"
    )
    assert [(one["file"], one["row"]) for one in answers] == [(str(tmp_path / "few.csv"), row) for row in (1, 2, 3)]
    found = [one["prediction"] for one in answers]
    assert found[:2] == [pytest.approx(95, abs=5), pytest.approx(3, abs=5)]
    assert other["metrics"]["mae"] == pytest.approx(sum(map(abs, found)) / 3, rel=1e-4)


def test_the_shipped_recipe_learns_at_once(tmp_path: Path) -> None:
    overrides = ["tracking.uri=none", "tracking.system_metrics=false", "train.threads=1", "train.epochs=8"]
    result = disttrain.train("table-diabetes", overrides=overrides, run_dir=tmp_path / "run")
    assert result.metrics["r2"] > 0.4
    assert 45 < result.metrics["rmse"] < 70
