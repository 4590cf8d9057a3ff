"""Several labels per sample: binary cross-entropy, average precision, F1 and subset accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from disttrain.errors import ConfigurationError

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MultiLabel:
    """What is made of a score for each of `classes`, (B, K), and of labels (B, K): 1 where a class is there, else 0.

    A class is predicted where its probability is above one half.
    """

    classes: tuple[str, ...]

    best: ClassVar[tuple[str, str]] = ("mean_average_precision", "max")

    def check(self, labels: torch.Tensor | None) -> None:
        """Raise ConfigurationError if all training labels are not zeros and ones for each class; None: unknown."""
        if labels is not None and labels.ndim == 1:
            raise self._not_several(labels)
        if labels is not None and not torch.equal(labels, labels.round()):
            raise ConfigurationError("task.options.multi_label: labels have to be 0 or 1, and some are neither.")

    def losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """The binary cross-entropy, a sample's being the mean over its classes: summed or (B,).

        `weight` (K,) multiplies that of each class; smoothing draws each label towards one half.
        """
        if labels.shape != logits.shape:
            raise self._not_several(labels)
        targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        of_samples = functional.binary_cross_entropy_with_logits(logits, targets, weight, reduction="none").mean(1)
        return of_samples.sum() if reduction == "sum" else of_samples

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, K), each by itself."""
        return logits.sigmoid()

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor | list[Any]]:
        """The summed loss, counts for each class, and what ranks the samples of each class."""
        there, predicted = labels > 0.5, logits > 0
        return {
            "loss": self.losses(logits.float(), labels),
            "hits": (there & predicted).sum(0),
            "predicted": predicted.sum(0),
            "there": there.sum(0),
            "whole": (there == predicted).all(1).sum(),
            "logits": logits.float().tolist(),
            "labels": there.tolist(),
        }

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """Means over the classes that some sample has, the share of samples that are wholly right, and the loss."""
        return {
            "mean_average_precision": _mean_of_known(self._precisions(sums)),
            "f1": _mean_of_known(self._f1(sums)),
            "subset_accuracy": int(sums["whole"]) / weight,
            "loss": float(sums["loss"]) / weight,
        }

    def details(self, sums: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """Of each class the average precision and F1, None without samples, and how many samples have it."""
        return {
            "classes": list(self.classes),
            "total": weight,
            "per_class": dict(zip(self.classes, self._precisions(sums), strict=True)),
            "per_class_metric": "average precision",
            "f1_per_class": dict(zip(self.classes, self._f1(sums), strict=True)),
            "samples_per_class": dict(zip(self.classes, sums["there"].tolist(), strict=True)),
        }

    def headline(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
        """The mean average precision and F1."""
        return f"mAP {metrics['mean_average_precision']:.2%}, F1 {metrics['f1']:.2%}, loss {metrics['loss']:.4f}"

    def report(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
        """Each class below the means of all."""
        width = max(len(name) for name in self.classes)
        return [
            f"{self.headline(metrics, details)}, {metrics['subset_accuracy']:.2%} exactly right",
            *(
                f"  {name:<{width}}  "
                + ("no samples" if found is None else f"AP {found:7.2%}  F1 {details['f1_per_class'][name]:7.2%}")
                for name, found in details["per_class"].items()
            ),
        ]

    def _not_several(self, labels: torch.Tensor) -> ConfigurationError:
        return ConfigurationError(
            f"task.options.multi_label: labels are {tuple(labels.shape)}, and should be (images, {len(self.classes)}), "
            "1 for each class that is there and 0 for each other."
        )

    def _precisions(self, sums: Mapping[str, Any]) -> list[float | None]:
        return average_precisions(np.array(sums["logits"]), np.array(sums["labels"]))

    def _f1(self, sums: Mapping[str, Any]) -> list[float | None]:
        counts = (sums[name].tolist() for name in ("hits", "predicted", "there"))
        return [
            2 * hits / (predicted + there) if there else None for hits, predicted, there in zip(*counts, strict=True)
        ]


def average_precisions(scores: _Array, truth: _Array) -> list[float | None]:
    """For each class the area under its precision-recall curve, without interpolation, as scikit-learn has it.

    `scores`: (N, K), `truth`: (N, K) bool. None for a class that no sample has.
    """
    return [_average_precision(*columns) for columns in zip(scores.T, truth.T, strict=True)]


def _average_precision(scores: _Array, truth: _Array) -> float | None:
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    last = np.append(scores[1:] != scores[:-1], True)  # equal scores are one threshold: none of them comes first
    hits = np.cumsum(truth)[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) / hits[-1] * precision).sum())


def _mean_of_known(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
