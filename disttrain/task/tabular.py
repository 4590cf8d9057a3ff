"""Tables: a quantity or a class, predicted from the columns of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain.data.sources.table_facts import describe_a_table
from disttrain.data.sources.tabular import rows_to_predict
from disttrain.errors import ConfigurationError, in_digits
from disttrain.task.base import Task
from disttrain.task.served_table import ServedTable, example_rows
from disttrain.task.single_label import SingleLabel, most_probable, probable_in_words

Rows = tuple[torch.Tensor, torch.Tensor]
"""features (B, F) float32, and targets (B,): float32 quantities, standardised, or int64 numbers of classes."""


class Tabular(Task):
    """Regression or classification of rows.

    The model gives (B, num_outputs): one standardised quantity, or a score for each class. Which, and all that it takes
    to read a new row, are the facts of a table's training set. Raises ConfigurationError for a set without them.
    """

    items = "rows"

    def __init__(self, train_set: Any) -> None:
        facts = getattr(train_set, "facts", {})
        if not describe_a_table(facts):
            raise ConfigurationError(
                'task.name = "tabular": the training set is not a table. Set data.dataset = "table"; in Python, make '
                "the sets from arrays with disttrain.data.table_sets(train, test)."
            )
        self.facts: Mapping[str, Any] = facts
        self.labels = SingleLabel(tuple(facts["classes"])) if "classes" in facts else None
        self.best = ("rmse", "min") if self.labels is None else self.labels.best

    def loss(self, model: nn.Module, batch: Rows) -> torch.Tensor:
        """The summed cross-entropy, or the summed squared error of the standardised quantity."""
        return self.losses(model, batch).sum()

    def losses(self, model: nn.Module, batch: Rows) -> torch.Tensor:
        """What `loss` sums, (B,): so that a row that makes it NaN can be named."""
        features, targets = batch
        outputs = self._outputs(model, features)
        if self.labels is not None:
            return self.labels.losses(outputs, targets, reduction="none")
        return functional.mse_loss(outputs, targets.to(outputs.dtype), reduction="none")

    def score(self, model: nn.Module, batch: Rows) -> dict[str, torch.Tensor]:
        """The loss, and the confusion matrix or the sums that the errors of a quantity follow from."""
        features, targets = batch
        outputs = self._outputs(model, features).float()
        if self.labels is not None:
            return self.labels.score(outputs, targets)
        return {
            "squared_error": (outputs - targets).square().sum(),
            "absolute_error": (outputs - targets).abs().sum(),
            "target": targets.sum(),
            "squared_target": targets.square().sum(),
        }

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """Accuracy and loss; or rmse and mae in the target's own units, r2, and loss."""
        if self.labels is not None:
            return self.labels.metrics(sums, weight)
        means = {name: float(one) / weight for name, one in sums.items()}
        unit = self.facts["target_std"]
        error, variance = means["squared_error"], means["squared_target"] - means["target"] ** 2
        # Of targets that are all alike it is 1 or 0, as scikit-learn has it.
        r2 = 1 - error / variance if variance > 1e-12 else float(error == 0)
        return {"rmse": math.sqrt(error) * unit, "mae": means["absolute_error"] * unit, "r2": r2, "loss": error}

    def details(self, sums: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """Of classes the counts, the share of correct rows in each, and the confusion matrix."""
        return {"total": weight} if self.labels is None else self.labels.details(sums, weight)

    def headline(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
        """The accuracy, or the errors."""
        if self.labels is not None:
            return self.labels.headline(metrics, details)
        return super().headline({name: value for name, value in metrics.items() if name != "loss"}, details)

    def report(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
        """The errors, or the accuracy of each class below that of all."""
        if self.labels is not None:
            return self.labels.report(metrics, details)
        return [f"{super().headline(metrics, details)} ({details['total']} rows)"]

    def predict(self, model: nn.Module, batch: torch.Tensor, *, top: int = 3) -> list[Any]:
        """For each row of features (B, F) the quantity in its own unit, or the `top` most probable classes."""
        outputs = self._outputs(model, batch).float()
        if self.labels is None:
            return list((outputs.cpu().double() * self.facts["target_std"] + self.facts["target_mean"]).tolist())
        return most_probable(self.labels.classes, self.labels.probabilities(outputs), top)

    def in_words(self, prediction: Any) -> str:
        """The quantity, or the classes with their probabilities."""
        return in_digits(prediction, 6) if self.labels is None else probable_in_words(prediction)

    def read(self, path: str) -> list[torch.Tensor]:
        """The features (F,) of each row of a file; of its columns the target and others may be missing."""
        return list(rows_to_predict(Path(path), self.facts))

    def export(self, model: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor]]:
        """From raw rows, one number for each column, to quantities or probabilities: see ServedTable."""
        return ServedTable(model, self.facts).eval(), (example_rows(self.facts),)

    def export_notes(self) -> dict[str, Any]:
        """What the numbers of a row are, in their order, with the categories that they may number, and the answer."""
        columns = [
            {key: column[key] for key in ("name", "categories") if key in column} for column in self.facts["columns"]
        ]
        classes = {} if self.labels is None else {"classes": list(self.labels.classes)}
        return {"columns": columns, "target": self.facts["target"], **classes}

    def describe(self) -> dict[str, Any]:
        """What is predicted."""
        return {"name": "tabular", "kind": self.facts["kind"], "target": self.facts["target"]}

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        """`num_features` and `num_outputs`; for classes also `num_classes`."""
        arguments = {"num_features": self.facts["num_features"], "num_outputs": self.facts["num_outputs"]}
        return arguments if self.labels is None else {**arguments, "num_classes": len(self.labels.classes)}

    def _outputs(self, model: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """(B, K) scores, or (B,) quantities. Raises ConfigurationError for a model that gives something else."""
        outputs: torch.Tensor = model(features)
        if outputs.shape != (len(features), self.facts["num_outputs"]):
            raise ConfigurationError(
                f"the model returned {tuple(outputs.shape)} for {len(features)} rows; it should return "
                f"({len(features)}, {self.facts['num_outputs']}), which is (rows, num_outputs)."
            )
        return outputs.squeeze(1) if self.labels is None else outputs
