"""Which evaluation is the best: what is kept by it, and what is said of a metric that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.commands import runs
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.runs.summary import summarise
from disttrain.testing import run_workers
from tests.disttrain.task.test_users_tasks import QUIET as USERS
from tests.disttrain.task.users import Regression, case
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


class Shy(disttrain.Task):
    """Its perplexity takes more samples than two."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="sum")

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        if weight < 3:
            raise ValueError("too few")
        return {"loss": sums["loss"].item() / weight}


def test_a_metric_that_there_is_not_is_refused(tmp_path: Path) -> None:
    """Before training if two samples tell, else after the first evaluation; the same folder then goes on."""
    unknown = "checkpoint.best=perplexity:min"
    with pytest.raises(ConfigurationError, match=r"'perplexity:min': ImageClassification has no metric .*accuracy"):
        train(tmp_path / "early", unknown)
    assert not (tmp_path / "early" / "checkpoints").exists()

    samples = [{"images": image.float(), "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    late: dict[str, Any] = {"run_dir": tmp_path / "late", "model": Net(), "task": Shy()}
    late |= {"train_set": samples, "test_set": samples[:6]}
    with pytest.raises(ConfigurationError, match=r"'perplexity:min': the evaluation has no metric .*: loss"):
        disttrain.train(load_recipe("digits", [*QUIET, unknown]), **late)
    assert [path.name for path in CheckpointStore(tmp_path / "late" / "checkpoints").paths()] == ["step-00000002"]
    assert disttrain.train(load_recipe("digits", [*QUIET, "checkpoint.best=loss:min"]), **late).step == 4
    with pytest.raises(RecipeError, match="should be METRIC:min or METRIC:max, as in perplexity:min, not 'perplexity'"):
        load_recipe("digits", ["checkpoint.best=perplexity"])


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    options = ("train.epochs=2", "optim.lr=0.0", "train.patience=9")
    train(tmp_path, *options, "train.max_steps=2", "checkpoint.best=accuracy:max")
    result = train(tmp_path, *options, "checkpoint.best=loss:min")
    assert result.loss > result.accuracy, "or an accuracy could not be taken for a lower loss"
    state = read_checkpoint(CheckpointStore(tmp_path / "checkpoints").paths()[-1]).state
    assert state["best_evaluation"] == {"value": result.loss, "step": result.step, "since": 0}


LATE = ("train.epochs=40", "checkpoint.best=loss:min", "optim.lr=0.0", "checkpoint.keep_last=2")


def test_a_run_ends_when_no_evaluation_was_better_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BatchNorm's statistics alone change: a little better at each evaluation, and less and less."""
    options = (*LATE, "train.patience=2", "train.min_delta=0.01")
    result = train(tmp_path / "whole", *options)
    journal = list(read_journal(tmp_path / "whole" / "journal.jsonl"))
    losses = {
        record["step"]: record["metrics"]["eval/loss"]
        for record in journal
        if record["kind"] == "metrics" and "eval/loss" in record["metrics"]
    }
    best, last = min(losses), 0
    for step, loss in losses.items():
        best, last = (step, step) if step == min(losses) or loss < losses[best] - 0.01 else (best, step)
    (event,) = [record for record in journal if record.get("name") == "stopped-early"]
    assert event["best"] == {"value": losses[best], "step": best, "since": 2}
    assert result.step == last == best + 2 * 2 < 80
    assert summarise(tmp_path / "whole")["state"] == "finished"
    said = capsys.readouterr().out
    assert f"stopping early: no evaluation of the last 2 was better than loss {losses[best]:.6g} at step {best}" in said
    assert "by more than 0.01 (train.patience, train.min_delta)" in said
    assert train(tmp_path / "whole", *options).step == result.step
    assert "is already finished" in capsys.readouterr().out

    # Stopped in between and resumed by other numbers of workers, it comes to the same end; with more patience, on.
    parts = tmp_path / "parts"
    train(parts, *LATE, "train.patience=2", "train.min_delta=0.01", f"train.max_steps={last - 1}")
    for outcome in run_workers(train, 2, args=(parts, *options, "train.max_steps=70"), process_group=False):
        assert outcome.step >= last
    assert train(parts, *LATE, "train.patience=99", "train.max_steps=70").step == 70


QUALITY = {1: float("nan"), 2: 2.0, 3: float("nan"), 4: 3.0, 5: 1.0}


class Measured(Regression):
    """Its quality, of which less is better, is that of the epoch, and is now and then not a number."""

    best = ("quality", "min")

    def score(self, model: nn.Module, batch: Any) -> Any:
        norm: Any = model.get_submodule("0")
        return {**super().score(model, batch), "epoch": [int(norm.num_batches_tracked) // 3]}

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"loss": sums["loss"].item() / weight, "quality": QUALITY.get(sums["epoch"][0], 9.0)}


class Unchanged(Measured):
    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"quality": 0.25}


def test_of_equals_the_first_is_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In what is kept, listed and said at the end, as where it is counted how long none was better."""
    one = case("regression")
    model, every = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 1)), ["checkpoint.keep_last=1", "train.epochs=9"]
    sets = {"train_set": one.train_set, "test_set": one.test_set}
    disttrain.train(
        USERS, overrides=[*every, "train.patience=2"], run_dir=tmp_path, task=Unchanged(), model=model, **sets
    )
    kept = [path.name for path in CheckpointStore(tmp_path / "checkpoints").paths()]
    assert kept == ["step-00000003", "step-00000009"]
    assert summarise(tmp_path)["best"]["step"] == 3
    said = capsys.readouterr().out
    assert "no evaluation of the last 2 was better than quality 0.25 at step 3 (train.patience)" in said
    assert f"best        {tmp_path}/checkpoints/step-00000003 (quality 0.25)" in said


def test_what_is_not_a_number_is_never_best_and_an_average_is_resumed_with_it(tmp_path: Path) -> None:
    """Epochs of three steps, of which the second is the best; two later ones are no better, so the fourth is last."""

    def run(folder: Path, *overrides: str) -> disttrain.Result:
        torch.manual_seed(0)
        one, model = case("regression"), nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 1))
        every = ["train.epochs=9", "train.patience=2", "train.ema_decay=0.9", "checkpoint.keep_last=1", *overrides]
        sets = {"train_set": one.train_set, "test_set": one.test_set}
        return disttrain.train(USERS, overrides=every, run_dir=folder, task=Measured(), model=model, **sets)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole).step == 12
    for end in (1, 6, 10):
        run(parts, f"train.max_steps={end}")
    assert run(parts).step == 12
    for folder in (whole, parts):
        kept = CheckpointStore(folder / "checkpoints").paths()
        assert [path.name for path in kept] == ["step-00000006", "step-00000012"]
        assert summarise(folder)["best"] == {"metric": "quality", "mode": "min", "step": 6}
    for before, after in zip(
        *(CheckpointStore(folder / "checkpoints").paths() for folder in (whole, parts)), strict=True
    ):
        expected, found = read_checkpoint(before), read_checkpoint(after)
        assert found.state["best_evaluation"] == expected.state["best_evaluation"]
        assert found.averages.keys() == {"1.weight", "1.bias", "0.weight", "0.bias"}
        for name, value in expected.averages.items():
            assert torch.equal(found.averages[name], value)
            assert not torch.equal(found.model[name], value)
