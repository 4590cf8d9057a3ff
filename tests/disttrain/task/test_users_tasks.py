"""Four tasks of users' own, trained: by any number of workers as by one, and the same bits in exact mode."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.commands import evaluate
from disttrain.data import StepSampler
from disttrain.errors import ConfigurationError, TaskError
from disttrain.runs.journal import read_journal
from disttrain.testing import run_workers
from tests.disttrain.task.users import CASES, Case, Regression, case, in_float64

QUIET: dict[str, Any] = {
    "data": {"batch_size": 16},
    "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "train": {"epochs": 1, "threads": 1, "eval_batch_size": 4, "log_every_steps": 1},
    "tracking": {"uri": "none", "system_metrics": False},
}
EXACT = ("parallel.exact=true", "train.epochs=2")


def train(run_dir: Path, one: Case, *overrides: str) -> disttrain.Result:
    objects = {"task": one.task, "model": one.model, "train_set": one.train_set, "test_set": one.test_set}
    return disttrain.train(QUIET, overrides=overrides, run_dir=run_dir, **objects)


def by_hand(one: Case) -> dict[str, torch.Tensor]:
    """The weights after an epoch of whole batches, without any of the machinery."""
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.01)
    for chosen in StepSampler(len(one.train_set), batch_size=16).order(0).split(16):
        batch = one.task.collate([one.train_set[index] for index in chosen.tolist()])
        weight = one.task.weight(batch)
        (one.task.loss(one.model, batch) / (len(chosen) if weight is None else weight)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(one.model.state_dict())


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """38 samples in batches of 16 and lengths that differ: uneven shares, micro-batches, tokens and paddings."""

    def weights(folder: Path, accumulate: int) -> dict[str, dict[str, torch.Tensor]]:
        trained = {name: in_float64(case(name)) for name in CASES}
        for name, one in trained.items():
            train(folder / name, one, f"train.accumulate={accumulate}")
        return {
            name: {key: value.detach() for key, value in one.model.state_dict().items()}
            for name, one in trained.items()
        }

    expected = {name: by_hand(in_float64(case(name))) for name in CASES}
    for size, accumulate in ((2, 1), (3, 2)):
        (found, *_) = run_workers(weights, size, args=(tmp_path / str(size), accumulate), process_group=False)
        for name in CASES:
            for key, value in expected[name].items():
                torch.testing.assert_close(found[name][key], value, rtol=1e-12, atol=1e-14, msg=f"{name} {key} {size}")


def bits(folder: Path, names: tuple[str, ...], *overrides: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Train in exact mode; the weights' hash and the metrics of each."""
    found = {}
    for name in names:
        one = case(name)
        result = train(folder / name, one, *EXACT, *overrides)
        found[name] = weights_sha256(one.model.state_dict()), result.metrics
    return found


def test_exact_mode_has_the_same_bits_and_metrics_everywhere(tmp_path: Path) -> None:
    """Alone, with three workers, and stopped with two and resumed with three: with dropout, BatchNorm and lists."""
    names = ("language", "detection")
    expected = bits(tmp_path / "1", names)
    assert run_workers(bits, 3, args=(tmp_path / "3", names), process_group=False) == [expected] * 3
    run_workers(bits, 2, args=(tmp_path / "cut", names, "train.max_steps=4"), process_group=False)
    assert run_workers(bits, 3, args=(tmp_path / "cut", names), process_group=False) == [expected] * 3
    losses = {
        folder: [
            record["metrics"]["train/loss"]
            for record in read_journal(tmp_path / folder / "language" / "journal.jsonl")
            if record["kind"] == "metrics" and "train/loss" in record["metrics"]
        ]
        for folder in ("1", "3", "cut")
    }
    assert losses["1"] == losses["3"] == losses["cut"]


class Noisy(Regression):
    """It draws from the global generators wherever it may, and holds a number that is unlike itself."""

    def __init__(self) -> None:
        self.missing = math.nan

    def prepare(self, batch: Any, draw: Any, *, training: bool) -> Any:
        return batch[0] + torch.randn_like(batch[0]), batch[1]

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {**super().metrics(sums, weight), "drawn": float(torch.rand(()))}


def test_what_a_task_draws_is_the_same_everywhere(tmp_path: Path) -> None:
    def trained(folder: Path, *overrides: str) -> tuple[str, dict[str, float]]:
        one = case("regression")
        result = train(folder, Case(Noisy(), one.model, one.train_set, one.test_set), *EXACT, *overrides)
        return weights_sha256(one.model.state_dict()), result.metrics

    expected = trained(tmp_path / "1")
    assert run_workers(trained, 2, args=(tmp_path / "2",), process_group=False) == [expected] * 2
    trained(tmp_path / "cut", "train.max_steps=4")
    assert trained(tmp_path / "cut") == expected


class OfRank(Regression):
    """Its arithmetic differs from one machine to another."""

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"mae": float(torch.distributed.get_rank())}


def test_all_ranks_have_the_metrics_of_the_first(tmp_path: Path) -> None:
    """They decide by them when to stop early."""

    def metrics(folder: Path) -> dict[str, float]:
        one = case("regression")
        return train(folder, Case(OfRank(), one.model, one.train_set, one.test_set), "train.max_steps=1").metrics

    assert run_workers(metrics, 2, args=(tmp_path,), process_group=False) == [{"mae": 0.0}] * 2


@pytest.mark.long
def test_every_task_has_the_same_bits_at_every_world_size(tmp_path: Path) -> None:
    names = tuple(CASES)
    expected = bits(tmp_path / "1", names)
    for size in (2, 3, 4):
        assert run_workers(bits, size, args=(tmp_path / str(size), names), process_group=False) == [expected] * size
    run_workers(bits, 2, args=(tmp_path / "cut", names, "train.max_steps=4"), process_group=False)
    assert run_workers(bits, 3, args=(tmp_path / "cut", names), process_group=False) == [expected] * 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_and_accumulation_are_exact_too(tmp_path: Path, precision: str) -> None:
    overrides = (f"train.precision={precision}", "train.accumulate=2")
    expected = bits(tmp_path / "1", ("language", "regression"), *overrides)
    assert expected != bits(tmp_path / "fp32", ("language", "regression"), "train.accumulate=2")
    found = run_workers(bits, 2, args=(tmp_path / "2", ("language", "regression"), *overrides), process_group=False)
    assert found == [expected] * 2


def test_samples_come_alike_from_dataloader_workers(tmp_path: Path) -> None:
    names = ("language",)
    assert bits(tmp_path / "1", names) == bits(tmp_path / "2", names, "data.layout=stream", "data.workers=1")


def test_batches_that_weigh_nothing_count_for_nothing(tmp_path: Path) -> None:
    """Some micro-batches, and one whole step, hold nothing but tokens that are not predicted."""
    one = in_float64(case("language"))
    order = StepSampler(38, batch_size=16).order(0).tolist()
    texts = {
        index: [1, -100] if place % 2 or place >= 32 else one.train_set[index] for place, index in enumerate(order)
    }
    for index, text in texts.items():
        one.train_set[index] = text
    train(tmp_path, one, "train.accumulate=8")
    again = in_float64(case("language"))
    optimizer = torch.optim.SGD(again.model.parameters(), lr=0.01)
    for chosen in (order[:16], order[16:32]):
        batch = again.task.collate([texts[index] for index in chosen if texts[index] != [1, -100]])
        (again.task.loss(again.model, batch) / again.task.weight(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in again.model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def test_a_task_of_a_recipe_is_evaluated_and_no_other_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = "tests.disttrain.task.users"
    recipe = QUIET | {
        "task": {"name": f"{users}:Regression"},
        "data": {"batch_size": 16, "dataset": f"{users}:regression_sets"},
        "model": {"name": f"{users}:regression_model"},
    }
    result = disttrain.train(recipe, run_dir=tmp_path / "run", overrides=["train.max_steps=2"])
    assert result.loss == result.metrics["loss"]
    shown = CliRunner().invoke(evaluate.command, [str(tmp_path / "run"), "--json", "--trust"], catch_exceptions=False)
    assert json.loads(shown.stdout) == {"metrics": result.metrics}
    for report, kind, words in (
        (lambda *_: {}["gone"], TaskError, r"^Regression\.report: KeyError: 'gone' \(.*test_users_tasks\.py:\d+\)$"),
        (lambda *_: "fine", ConfigurationError, r"^Regression\.report returned a str: it has to be a list of lines"),
    ):
        monkeypatch.setattr(Regression, "report", report)
        with pytest.raises(kind, match=words):
            evaluate.command.main([str(tmp_path / "run"), "--trust"], standalone_mode=False)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"] == result.metrics
    checkpoint = read_checkpoint(CheckpointStore(tmp_path / "run" / "checkpoints").paths()[-1])
    assert checkpoint.state["task"] == {"name": "Regression"}
    assert checkpoint.state["metrics"] == {f"eval/{name}": value for name, value in result.metrics.items()}
    with pytest.raises(ConfigurationError, match=r"task.name was 'tests.*Regression', now 'tests.*Speech'"):
        disttrain.train(recipe | {"task": {"name": f"{users}:Speech"}}, run_dir=tmp_path / "run")
    one = case("regression")
    train(tmp_path / "given", one, "train.max_steps=2")
    with pytest.raises(ConfigurationError, match=r"task with name = 'Regression', and task.name .* 'Speech': give the"):
        train(tmp_path / "given", Case(case("speech").task, one.model, one.train_set, one.test_set))
