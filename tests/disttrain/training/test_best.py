"""Which evaluation is the best: what is kept by it, and what is said of a metric that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import disttrain
from disttrain.checkpoint import CheckpointStore
from disttrain.commands import runs
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.recipe import load_recipe
from disttrain.runs.summary import summarise
from tests.disttrain.training.test_init import IMAGES, LABELS, QUIET, Net


def train(run_dir: Path, *overrides: str) -> disttrain.Result:
    torch.manual_seed(0)
    objects = {"train_set": (IMAGES, LABELS), "test_set": (IMAGES[:6], LABELS[:6])}
    return disttrain.train(load_recipe("digits", [*QUIET, *overrides]), run_dir=run_dir, model=Net(), **objects)


def test_checkpoints_are_kept_by_the_metric_of_the_recipe(tmp_path: Path) -> None:
    train(tmp_path, "train.epochs=4", "checkpoint.keep_last=1", "checkpoint.best=loss:min", "optim.lr=0.3")
    summary = summarise(tmp_path)
    losses = {one["step"]: one["metrics"]["loss"] for one in summary["checkpoints"]}
    assert summary["best"] == {"metric": "loss", "mode": "min", "step": min(losses, key=lambda step: losses[step])}
    assert summary["metrics"]["loss"] == losses[8]
    shown = CliRunner().invoke(runs.command, ["show", str(tmp_path)]).output
    assert f"step 8 of 8, epoch 4, loss {losses[8]:.4g}" in shown
    assert ("(best)" in shown) is (len(losses) > 1)


def test_a_metric_that_no_evaluation_has_is_refused_after_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'perplexity:min': .* no metric of that name; it has accuracy, loss"):
        train(tmp_path, "train.epochs=3", "checkpoint.best=perplexity:min")
    assert [path.name for path in CheckpointStore(tmp_path / "checkpoints").paths()] == ["step-00000002"]
    assert train(tmp_path, "train.epochs=3", "checkpoint.best=accuracy:max").step == 6
    with pytest.raises(RecipeError, match="should be METRIC:min or METRIC:max, as in perplexity:min, not 'perplexity'"):
        load_recipe("digits", ["checkpoint.best=perplexity"])
