"""Image classification: which of several classes an image belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain.data import Split, crop, cutout, flip, normalise, read_picture
from disttrain.data.augment import CROP_COLUMNS, CUTOUT_COLUMNS, FLIP_COLUMN, NUM_UNIFORM
from disttrain.data.dataset import SplitOutline
from disttrain.errors import ConfigurationError
from disttrain.recipe import Recipe
from disttrain.task.base import Task

Images = tuple[torch.Tensor, torch.Tensor]
"""images (B, C, H, W) uint8 or float32, and labels (B,) int64."""


class ImageClassification(Task):
    """Cross-entropy over the classes of a data set of images.

    Images of bytes are augmented as the recipe's `data` says and normalised by the set's mean and standard deviation; a
    model gets them as (B, C, H, W) float32, and returns a score for each class, (B, num_classes).
    """

    best = ("accuracy", "max")
    items = "images"

    def __init__(self, train_set: Split | SplitOutline, recipe: Recipe) -> None:
        """Raises ConfigurationError for a set that has a single class."""
        if len(train_set.classes) < 2:
            raise ConfigurationError(
                f"the training set has one class only, {train_set.classes[0]!r}: there is nothing to tell apart. "
                "Give at least two; a folder needs one folder for each class."
            )
        self.classes, self.sample_shape = train_set.classes, train_set.sample_shape
        self.mean, self.std = train_set.mean, train_set.std
        self.crop_padding, self.flip, self.cutout = recipe.data.crop_padding, recipe.data.flip, recipe.data.cutout
        self.label_smoothing = recipe.train.label_smoothing

    def prepare(
        self, batch: Images | torch.Tensor, draw: Callable[[int], torch.Tensor], *, training: bool
    ) -> Images | torch.Tensor:
        """The images augmented, if `training`, and normalised; a batch to predict has no labels."""
        if isinstance(batch, torch.Tensor):
            return self._normalised(batch)
        images, labels = batch
        if not training or not (self.crop_padding or self.flip or self.cutout):
            return self._normalised(images), labels
        u = draw(NUM_UNIFORM)
        if self.crop_padding:
            images = crop(images, self.crop_padding, u[:, CROP_COLUMNS])
        if self.flip:
            images = flip(images, u[:, FLIP_COLUMN])
        images = self._normalised(images)
        if self.cutout:
            images = cutout(images, self.cutout, u[:, CUTOUT_COLUMNS])
        return images, labels

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.mean is None or self.std is None else normalise(images, self.mean, self.std)

    def loss(self, model: nn.Module, batch: Images) -> torch.Tensor:
        """The summed cross-entropy, with the recipe's label smoothing."""
        images, labels = batch
        scores = self._scores(model, images)
        return functional.cross_entropy(scores, labels, reduction="sum", label_smoothing=self.label_smoothing)

    def losses(self, model: nn.Module, batch: Images) -> torch.Tensor:
        """What `loss` sums, (B,): so that an image that makes it NaN can be named."""
        images, labels = batch
        scores = self._scores(model, images)
        return functional.cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)

    def score(self, model: nn.Module, batch: Images) -> dict[str, torch.Tensor]:
        """The cross-entropy without smoothing, and `confusion[i, j]`: how many of class i were taken for class j."""
        images, labels = batch
        num_classes = len(self.classes)
        logits = self._scores(model, images)
        pairs = (labels * num_classes + logits.argmax(1)).cpu()  # counting on a GPU has no deterministic kernel
        confusion = torch.bincount(pairs, minlength=num_classes * num_classes)
        return {
            "loss": functional.cross_entropy(logits.float(), labels, reduction="sum"),
            "confusion": confusion.view(num_classes, num_classes),
        }

    def _scores(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """(B, num_classes). Raises ConfigurationError for a model that returns something else."""
        scores: Any = model(images)
        needed = (len(images), len(self.classes))
        if isinstance(scores, torch.Tensor) and scores.shape == needed:
            return scores
        is_tensor = isinstance(scores, torch.Tensor)
        found = f"a tensor of shape {tuple(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
        raise ConfigurationError(
            f"the model returned {found} for {len(images)} image{'s' if len(images) > 1 else ''}"
            f"{' in training mode (model.train())' if model.training else ''}: needed is a tensor of shape {needed}, a "
            f"score for each of the {needed[1]} classes."
        )

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """The share of correct images, 0 to 1, and the mean loss of one."""
        total = max(1, int(sums["confusion"].sum()))
        return {"accuracy": int(sums["confusion"].diagonal().sum()) / total, "loss": float(sums["loss"]) / total}

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
        return [
            f"accuracy {metrics['accuracy']:.2%} {counts}, loss {metrics['loss']:.6f}",
            *(
                f"  {name:<{width}}  {'no samples' if share is None else f'{share:7.2%}'}"
                for name, share in details["per_class"].items()
            ),
        ]

    def predict(self, model: nn.Module, batch: Images | torch.Tensor, *, top: int = 3) -> list[dict[str, Any]]:
        """The `top` most probable classes of each image."""
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        return [
            {
                "classes": [
                    {"class": self.classes[index], "probability": row[index].item()}
                    for index in row.argsort(descending=True)[:top].tolist()
                ]
            }
            for row in self._scores(model, images).softmax(1)
        ]

    def in_words(self, prediction: Any) -> str:
        """The classes with their probabilities."""
        return ", ".join(f"{guess['class']} {guess['probability']:.1%}" for guess in prediction["classes"])

    def read(self, path: str) -> list[torch.Tensor]:
        """The picture at `path`, (C, H, W) uint8, as the data set `folder` reads it. Raises ConfigurationError."""
        channels, height, width = self.sample_shape
        if self.mean is None:
            raise ConfigurationError(
                "the model was trained on floats that its data set made, and how it makes them of a picture is not "
                "known here: give them to the model from Python, or train on bytes (uint8) with data.mean and data.std."
            )
        if channels not in (1, 3):
            raise ConfigurationError(
                f"the model was trained on images of {channels} channels, and pictures are read in 3 (colour) or 1 "
                "(grey)."
            )
        return [read_picture(Path(path), (height, width), channels)]

    def describe(self) -> dict[str, Any]:
        """The name alone: classes and preparation are compared with the data."""
        return {"name": "image-classification"}

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        """`num_classes` and `sample_shape`, (C, H, W)."""
        return {"num_classes": len(self.classes), "sample_shape": self.sample_shape}
