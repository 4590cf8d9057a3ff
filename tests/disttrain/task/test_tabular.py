"""Regression and classification of a table's rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.data import SampleSets
from disttrain.data.sources.tabular import load_table, table_sets
from disttrain.errors import ConfigurationError
from disttrain.models.mlp import Mlp
from disttrain.recipe import DataRecipe
from disttrain.task.tabular import Tabular
from disttrain.tracking.export import DESCRIPTION_FILE, EXPORT_FILE, export_model


def people(kind: str) -> SampleSets:
    """70 rows to train on and 31 to test on, of three columns; the target is far from 0 and from unit variance."""
    generator = np.random.default_rng(0)
    features = generator.normal(50, 20, (101, 3))
    quantity = features @ [3.0, -2.0, 0.5] + generator.normal(400, 30, 101)
    targets = quantity if kind == "regression" else np.array(["low", "mid", "top"])[np.digitize(quantity, [430, 500])]
    return table_sets((features[:70], targets[:70]), (features[70:], targets[70:]))


def whole(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return samples.dataset.features, samples.dataset.targets


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_losses_of_uneven_parts_add_up_to_the_whole_sets(kind: str) -> None:
    sets = people(kind)
    task = Tabular(sets.train)
    torch.manual_seed(0)
    model = Mlp(3, sets.train.facts["num_outputs"], widths=(8,)).double()
    features, targets = whole(sets.train)
    features = features.double()

    def gradient(*sizes: int) -> torch.Tensor:
        model.zero_grad()
        for part in zip(features.split(sizes), targets.split(sizes), strict=True):
            task.loss(model, part).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    alone = gradient(70)
    for sizes in ((35, 35), (1, 69), (24, 23, 23), (5, 60, 3, 2)):
        assert (gradient(*sizes) - alone).abs().max() < 1e-12 * alone.abs().max()


def test_the_metrics_of_a_quantity_are_in_its_own_units() -> None:
    sets = people("regression")
    task = Tabular(sets.train)
    assert task.best == ("rmse", "min")
    torch.manual_seed(0)
    model = Mlp(**task.model_arguments(sets.train), widths=(8,)).eval()
    with torch.no_grad():
        sums = task.score(model, whole(sets.test))
        answers = np.array(task.predict(model, sets.test.dataset.features))
    facts = sets.train.facts
    truth = sets.test.dataset.targets.double().numpy() * facts["target_std"] + facts["target_mean"]
    errors = answers - truth
    metrics = task.metrics(sums, len(sets.test))
    assert metrics["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert metrics["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert metrics["r2"] == pytest.approx(1 - (errors**2).sum() / ((truth - truth.mean()) ** 2).sum(), rel=1e-4)
    assert metrics["loss"] == pytest.approx((errors**2).mean() / facts["target_std"] ** 2, rel=1e-5)
    assert 300 < truth.mean() < 700


def test_targets_that_are_all_alike_have_the_r2_of_scikit_learn() -> None:
    sets = people("regression")
    task = Tabular(sets.train)
    model = Mlp(3, 1, widths=()).requires_grad_(False)
    features = sets.test.dataset.features
    assert task.metrics(task.score(model, (features, torch.ones(31))), 31)["r2"] == 0.0


def test_a_class_is_predicted_with_the_probability_of_each() -> None:
    sets = people("classification")
    task = Tabular(sets.train)
    assert task.best == ("accuracy", "max")
    assert task.model_arguments(sets.train) == {"num_features": 3, "num_outputs": 3, "num_classes": 3}
    torch.manual_seed(0)
    model = Mlp(3, 3).eval()
    features, targets = whole(sets.test)
    with torch.no_grad():
        answers = task.predict(model, features)
        metrics = task.metrics(task.score(model, (features, targets)), 31)
    for answer in answers:
        assert {guess["class"] for guess in answer["classes"]} == {"low", "mid", "top"}
        assert sum(guess["probability"] for guess in answer["classes"]) == pytest.approx(1)
    likeliest = [answer["classes"][0]["class"] for answer in answers]
    assert task.in_words(answers[0]).startswith(f"{likeliest[0]} ")
    hits = [
        guess == sets.train.facts["classes"][target] for guess, target in zip(likeliest, targets.tolist(), strict=True)
    ]
    assert metrics["accuracy"] == pytest.approx(sum(hits) / 31)


def test_what_is_no_table_and_a_model_of_another_shape_are_refused() -> None:
    sets = people("regression")
    with pytest.raises(ConfigurationError, match=r'the training set is not a table\. Set data\.dataset = "table"'):
        Tabular([(torch.zeros(3), torch.zeros(()))])
    for key, wrong in (
        ("columns", [{"name": "x"}]),
        ("kind", "ranking"),
        ("num_features", 2),
        ("target_std", "1"),
        ("target_mean", math.nan),
        ("format", None),
        ("format", {"delimiter": ";;"}),
        ("format", {"path": "x"}),
    ):
        with pytest.raises(ConfigurationError, match="the training set is not a table"):
            Tabular(replace(sets.train, facts={**sets.train.facts, key: wrong}))
    with pytest.raises(ConfigurationError, match=r"the model returned \(70,\) for 70 rows; it should return \(70, 1\)"):
        Tabular(sets.train).loss(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), whole(sets.train))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_exported_program_takes_raw_rows_and_gives_what_predict_gives(tmp_path: Path, kind: str) -> None:
    """Numbers among categories, missing ones and unknown ones, and a column that tells nothing."""
    targets = ["1.5", "2.5", "9", "4"] if kind == "regression" else ["no", "yes", "no", "no"]
    rows = ["a,1,,7", "b,1,20,7", "a,1,-3.5,8", "c,1,1e6,9"]
    table = "\n".join(["word,same,number,code,y", *(f"{row},{y}" for row, y in zip(rows, targets, strict=True))])
    (tmp_path / "t.csv").write_text(table)
    options = {"train_file": "t.csv", "test_file": "t.csv", "target": "y", "categorical": ["code"]}
    sets = load_table(DataRecipe.model_construct(root=str(tmp_path), options=options))
    task = Tabular(sets.train)
    arguments = task.model_arguments(sets.train)
    torch.manual_seed(0)
    model = Mlp(arguments["num_features"], arguments["num_outputs"], widths=(8,)).eval().requires_grad_(False)

    assert export_model(tmp_path / "model", model, task.export, task.export_notes) is None
    program = torch.export.load(tmp_path / "model" / EXPORT_FILE).module()
    described = json.loads((tmp_path / "model" / DESCRIPTION_FILE).read_text())
    assert described["columns"][:2] == [{"name": "word", "categories": ["a", "b", "c"]}, {"name": "same"}]
    assert described["inputs"] == [{"shape": [-1, 4], "dtype": "float64"}]
    (tmp_path / "new.csv").write_text("number,code,word,same\n?,8,b,2\n5,1,zebra,1\n-1,9,c,1\n")
    features = torch.stack(task.read(str(tmp_path / "new.csv")))
    raw = torch.tensor([[1, 2, math.nan, 1], [9, 1, 5, -1], [2, 1, -1, 2]], dtype=torch.float64)
    answers = task.predict(model, features)
    if kind == "classification":
        by_class = [{guess["class"]: guess["probability"] for guess in answer["classes"]} for answer in answers]
        answers = [[of["no"], of["yes"]] for of in by_class]
    wanted = [answer if kind == "classification" else [answer] for answer in answers]
    assert program(raw).tolist() == [pytest.approx(row, rel=1e-5) for row in wanted]
