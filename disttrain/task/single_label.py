"""One label per sample: cross-entropy, accuracy and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from disttrain.distributed import later
from disttrain.errors import ConfigurationError


@dataclass(frozen=True)
class SingleLabel:
    """What is made of a score for each of `classes`, (B, K), and of labels: (B,) int64, or probabilities (B, K).

    With more than `top_k` classes the share of samples whose label is among the `top_k` best is a metric, too; 0 turns
    it off. A label of probabilities counts as its most probable class in all metrics but the loss.
    """

    classes: tuple[str, ...]
    top_k: int = 0

    best: ClassVar[tuple[str, str]] = ("accuracy", "max")

    def check(self, labels: torch.Tensor | None) -> None:
        """Raise ConfigurationError if probabilities among all training labels do not add up to 1; None: unknown."""
        if labels is not None and labels.ndim == 2:
            wrong = ((labels.sum(1) - 1).abs() > 1e-3).nonzero()
            if len(wrong):
                raise ConfigurationError(
                    f"label {int(wrong[0])} adds up to {labels[wrong[0]].sum():.4g}: class probabilities have to "
                    "add up to 1. For several labels per image set task.options.multi_label = true."
                )

    def losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """The cross-entropy, summed or (B,); `weight` (K,) multiplies that of each class."""
        return functional.cross_entropy(
            logits, labels, weight=weight, reduction=reduction, label_smoothing=label_smoothing
        )

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, K), adding up to 1."""
        return logits.softmax(1)

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The summed loss, the hits among the best, and `confusion[i, j]`: how many of class i were taken for j."""
        num_classes = len(self.classes)
        loss = self.losses(logits.float(), labels)
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        confusion = _counts(classes * num_classes + logits.argmax(1), num_classes * num_classes)
        found = {"loss": loss, "confusion": confusion.view(num_classes, num_classes)}
        if self._counts_top_k:
            found["top_k"] = (logits.topk(self.top_k, 1).indices == classes[:, None]).sum()
        return found

    @property
    def _counts_top_k(self) -> bool:
        return 0 < self.top_k < len(self.classes)

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """The share of correct samples, 0 to 1, the mean loss of one, and the share with a label among the best."""
        total = max(1, int(sums["confusion"].sum()))
        found = {"accuracy": int(sums["confusion"].diagonal().sum()) / total, "loss": float(sums["loss"]) / total}
        return {**found, f"top{self.top_k}_accuracy": int(sums["top_k"]) / total} if self._counts_top_k else found

    def details(self, sums: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """Counts, the share of correct ones in each class (None without samples), and the confusion matrix."""
        confusion = sums["confusion"]
        hits, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
        shares = [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]
        return {
            "classes": list(self.classes),
            "correct": sum(hits),
            "total": sum(totals),
            **self.metrics(sums, weight),
            "per_class": dict(zip(self.classes, shares, strict=True)),
            "confusion": confusion.tolist(),
        }

    def headline(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
        """The accuracy, with counts and the loss where the details are known."""
        accuracy = f"accuracy {metrics['accuracy']:.2%}"
        if not details:
            return accuracy
        return f"{accuracy} ({details['correct']} of {details['total']}), loss {metrics['loss']:.4f}"

    def report(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
        """The accuracy of each class below that of all."""
        counts = f"({details['correct']} of {details['total']})"
        width = max(len(name) for name in self.classes)
        top_k = f", top-{self.top_k} {metrics[f'top{self.top_k}_accuracy']:.2%}" if self._counts_top_k else ""
        return [
            f"accuracy {metrics['accuracy']:.2%} {counts}{top_k}, loss {metrics['loss']:.6f}",
            *(
                f"  {name:<{width}}  {'no samples' if share is None else f'{share:7.2%}'}"
                for name, share in details["per_class"].items()
            ),
        ]


def most_probable(classes: Sequence[str], probabilities: torch.Tensor, top: int) -> list[dict[str, Any]]:
    """The `top` most probable classes of each sample, as JSON can hold them; `probabilities`: (B, K)."""
    return [
        {
            "classes": [
                {"class": classes[index], "probability": row[index].item()}
                for index in row.argsort(descending=True)[:top].tolist()
            ]
        }
        for row in probabilities
    ]


def probable_in_words(prediction: Mapping[str, Any]) -> str:
    """What `most_probable` says of a sample, in words."""
    return ", ".join(f"{guess['class']} {guess['probability']:.1%}" for guess in prediction["classes"])


def _counts(values: torch.Tensor, num: int) -> torch.Tensor:
    """How often each of 0 to `num` - 1 is among the values, (num,) int64."""
    if later.is_asynchronous(values.device):  # bincount waits for the largest value, and is not deterministic there
        return torch.zeros(num, dtype=torch.int64, device=values.device).index_add_(0, values, torch.ones_like(values))
    return torch.bincount(values.cpu(), minlength=num)
