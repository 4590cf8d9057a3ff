"""A loss and a score have to be sums over the batch's items: what is none is noticed before training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import disttrain
from disttrain.errors import ConfigurationError
from tests.disttrain.task.test_users_tasks import train
from tests.disttrain.task.users import Case, Regression, case


def with_task(task: disttrain.Task) -> Case:
    one = case("regression")
    return Case(task, one.model, one.train_set, one.test_set)


class MeanScore(Regression):
    def score(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        features, values = batch
        return {"mae": (model(features).squeeze(1) - values).abs().mean()}


class MetricsOfMeans(MeanScore):
    """Makes of them what it likes."""

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"mae": float(sums["mae"]) / 3}


class Retrieval(disttrain.Task):
    """How many samples find themselves among those of the batch: no more of the same ones twice over."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        found = self._similarities(model, batch)
        return functional.cross_entropy(found, torch.arange(len(found)), reduction="sum")

    def score(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        found = self._similarities(model, batch)
        right = (found.argmax(1) == torch.arange(len(found))).float().sum()
        return {"loss": self.loss(model, batch), "right": right, "listed": [1.5], "zero": torch.tensor(0.0)}

    def _similarities(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return -(model(batch[0]) - model(batch[0]).T).square()


def test_a_score_that_is_a_mean_is_refused_where_it_would_be_divided_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        train(tmp_path / "mean", with_task(MeanScore()))
    assert re.match(
        r"MeanScore\.score returns a mean for 'mae': it is (\S+) for the first samples of the test set and \1 for the "
        r"same ones twice over\. It has to be the sum over the batch's items, .*reduction=\"sum\"",
        str(caught.value),
    )
    assert not (tmp_path / "mean" / "journal.jsonl").exists()
    allowed = [(MetricsOfMeans(),), (Retrieval(),), (MeanScore(), "train.eval_batch_size=1")]
    for number, (task, *overrides) in enumerate(allowed):
        assert train(tmp_path / str(number), with_task(task), "train.max_steps=1", *overrides).step == 1


class Broadcast(Regression):
    """(B, 1) against (B,): all pairs of the batch."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        features, values = batch
        return (model(features) - values).abs().sum()


class Contrast(Retrieval):
    """At the start it tells nothing from anything: the loss of each of B samples is log(B)."""

    def _similarities(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super()._similarities(model, batch) * 1e-6


class Nothing(Regression):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * 0


def test_a_loss_of_all_pairs_of_the_batch_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, and trained on; a loss that is 0, and one of each sample against all others, are no such thing."""
    for task in (Broadcast(), Contrast(), Nothing()):
        assert train(tmp_path / type(task).__name__, with_task(task), "train.max_steps=1").step == 1
        said = capsys.readouterr().err
        assert said.count("Broadcast.loss grows with the square of the batch") == (type(task) is Broadcast)
        assert said.count("grows with") == (type(task) is Broadcast)
