"""Tables: a quantity or a class, predicted from the columns of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain.data.sources.tabular import rows_to_predict
from disttrain.errors import ConfigurationError
from disttrain.task.base import Task


class Tabular(Task):
    """Regression or classification of rows: batches are (features (B, F) float32, targets (B,)).

    The model gives (B, num_outputs): one standardised quantity, or a score for each class. Which, and all that it takes
    to read a new row, are the facts of a table's training set. Raises ConfigurationError for a set without them.
    """

    name = "tabular"

    def __init__(self, train_set: Any) -> None:
        facts = getattr(train_set, "facts", {})
        if "kind" not in facts or "columns" not in facts:
            raise ConfigurationError(
                'task.name = "tabular": the training set is no table. Set data.dataset = "table"; in Python, make the '
                "sets of arrays by disttrain.data.table_sets(train, test)."
            )
        self.facts: Mapping[str, Any] = facts
        self.classes: tuple[str, ...] = tuple(facts.get("classes", ()))
        self.best = ("accuracy", "max") if self.classes else ("rmse", "min")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Cross-entropy, or the squared error of the standardised quantity."""
        features, targets = batch
        return self._loss(self._outputs(model, features), targets)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """The loss, and the confusion matrix or what the errors of a quantity come to."""
        features, targets = batch
        outputs = self._outputs(model, features).float()
        sums = {"loss": self._loss(outputs, targets)}
        if self.classes:
            num = len(self.classes)
            pairs = targets * num + outputs.argmax(1)
            return {**sums, "confusion": torch.bincount(pairs, minlength=num * num).view(num, num)}
        return {
            **sums,
            "absolute_error": (outputs - targets).abs().sum(),
            "target": targets.sum(),
            "squared_target": targets.square().sum(),
        }

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """Loss and accuracy, or loss, rmse and mae in the target's own units, and r2 where the targets differ."""
        loss = float(sums["loss"]) / weight
        if self.classes:
            return {"loss": loss, "accuracy": float(sums["confusion"].diagonal().sum()) / weight}
        unit = self.facts["target_std"]
        found = {
            "loss": loss,
            "rmse": math.sqrt(loss) * unit,
            "mae": float(sums["absolute_error"]) / weight * unit,
        }
        variance = float(sums["squared_target"]) / weight - (float(sums["target"]) / weight) ** 2
        return {**found, "r2": 1 - loss / variance} if variance > 1e-12 else found

    def predict(self, model: nn.Module, batch: Any) -> list[Any]:
        """For each row the quantity in its own unit, or the probability of each class."""
        outputs = self._outputs(model, batch).float()
        if not self.classes:
            return list((outputs.double().cpu() * self.facts["target_std"] + self.facts["target_mean"]).tolist())
        return [dict(zip(self.classes, row, strict=True)) for row in outputs.softmax(1).tolist()]

    def read(self, path: str) -> list[torch.Tensor]:
        """The features (F,) of each row of a file; of its columns the target and others may be missing."""
        return list(rows_to_predict(Path(path), self.facts))

    def describe(self) -> dict[str, Any]:
        """What is predicted."""
        return {"name": "tabular", "kind": self.facts["kind"], "target": self.facts["target"]}

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        """`num_features` and `num_outputs`; for classes also `num_classes`."""
        arguments = {"num_features": self.facts["num_features"], "num_outputs": self.facts["num_outputs"]}
        return {**arguments, "num_classes": len(self.classes)} if self.classes else arguments

    def _outputs(self, model: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """(B, K) scores, or (B,) quantities. Raises ConfigurationError for a model that gives something else."""
        outputs: torch.Tensor = model(features)
        if outputs.shape != (len(features), self.facts["num_outputs"]):
            raise ConfigurationError(
                f"the model gives {tuple(outputs.shape)} for {len(features)} rows; it should give "
                f"({len(features)}, {self.facts['num_outputs']}), which is (rows, num_outputs)."
            )
        return outputs if self.classes else outputs.squeeze(1)

    def _loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.classes:
            return functional.cross_entropy(outputs, targets, reduction="sum")
        return functional.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum")
