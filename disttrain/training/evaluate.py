"""The exact evaluation by all workers: every sample once, in no worker twice, the same numbers at every world size.

The set is cut into the same batches whatever the world size, and the workers deal them out among themselves. So each
sample is computed in the same company, and its logits have the same bits. Counts are summed as integers; the batches'
losses are collected first and added in the order of the set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain import rng
from disttrain.data import EvalLoader
from disttrain.distributed.collectives import sum_
from disttrain.faultpoints import reached
from disttrain.models.buffers import buffers_kept


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on a set. `confusion[i, j]` counts the samples of class i that were taken for class j."""

    confusion: torch.Tensor
    loss: float
    classes: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many samples there were."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """How many were given their own class."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """The share of correct ones, 0 to 1."""
        return self.correct / self.total if self.total else 0.0

    @property
    def per_class(self) -> dict[str, float | None]:
        """The share of correct ones in each class; None for a class without samples."""
        totals = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return {
            name: hit / total if total else None for name, hit, total in zip(self.classes, hits, totals, strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """The evaluation as `disttrain evaluate --json` prints it, with the confusion matrix."""
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist(),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    classes: tuple[str, ...],
    *,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate `model` on all of the loader's batches, shared among the ranks. Every rank must call it.

    The loss is the mean cross-entropy per sample, without label smoothing. `autocast` is the type to compute in,
    `on_batch` is called after each of this rank's batches. The model is left as it was, its buffers included: what a
    rank evaluates must not show in what it trains.
    """
    was_training = model.training
    model.eval()
    num_classes = len(classes)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    losses = torch.zeros(loader.num_batches, dtype=torch.float64)
    with buffers_kept(model):
        for index, images, labels in loader:
            reached("evaluation", batch=index)
            rng.seed_layers(images.device, 0, 0, index)  # a model that draws even here must know no worker either
            with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
                logits = model(images)
            if index >= loader.num_batches:
                continue  # only so that every rank makes as many forward passes
            losses[index] = functional.cross_entropy(logits.float(), labels, reduction="sum").double().cpu()
            pairs = (labels * num_classes + logits.argmax(1)).cpu()
            confusion += torch.bincount(pairs, minlength=num_classes * num_classes)
            on_batch()
    model.train(was_training)
    sum_(confusion)
    sum_(losses)  # each entry is one rank's own number, and zeros: the sum adds no rounding
    matrix = confusion.view(num_classes, num_classes)
    total = max(1, int(matrix.sum()))
    return Evaluation(matrix, float(losses.sum()) / total, classes)
