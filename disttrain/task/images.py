"""Image classification: which of several classes an image belongs to, or which of them are in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain import rng
from disttrain.data import (
    Split,
    crop,
    cutout,
    labels_of,
    mirror,
    mirrored_alternately,
    mirrored_by_chance,
    normalise,
    on_device,
    read_picture,
)
from disttrain.data.augment import CROP_COLUMNS, CUTOUT_COLUMNS, FLIP_COLUMN, NUM_UNIFORM
from disttrain.data.dataset import SplitOutline
from disttrain.data.mix import NUM_MIX, mix
from disttrain.distributed import later
from disttrain.errors import ConfigurationError
from disttrain.recipe import Recipe
from disttrain.task.base import Task
from disttrain.task.class_weights import checked_class_weights, weights_on
from disttrain.task.multi_label import MultiLabel
from disttrain.task.served_images import ServedImages, example_images
from disttrain.task.single_label import SingleLabel, most_probable, probable_in_words
from disttrain.task.views import over_views

Images = tuple[torch.Tensor, torch.Tensor]
"""images (B, C, H, W) uint8 or float32, and labels: (B,) int64, or (B, K) float32, a number for each class."""


class ImageClassification(Task):
    """Cross-entropy over the classes of a data set of images.

    Images of bytes are augmented as the recipe's `data` says and normalised by the set's mean and standard deviation; a
    model gets them as (B, C, H, W) float32, and returns a score for each class, (B, num_classes).
    """

    items = "images"

    def __init__(
        self,
        train_set: Split | SplitOutline,
        recipe: Recipe,
        *,
        multi_label: bool = False,
        class_weights: Sequence[float] | str | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        top_k: int = 5,
    ) -> None:
        """What the images are and what is done to them follows from `train_set` and `recipe`; the rest are the options.

        Args:
            train_set, recipe: the data set, or what a checkpoint holds of it, and the recipe.
            multi_label: an image may have several labels: 0 or 1 for each class, and binary cross-entropy.
            class_weights: multiplies each class's part of the training loss, which is divided by the number of images
                as ever; "balanced" takes N / (K * images of the class).
            mixup, cutmix: alpha of the Beta distribution of the shares in which training images are mixed; 0: off.
            top_k: the share of images whose label is among so many best is a metric where there are more classes.

        Raises ConfigurationError for a set that has a single class, and for an option that does not fit.
        """
        if len(train_set.classes) < 2:
            raise ConfigurationError(
                f"the training set has one class only, {train_set.classes[0]!r}: there is nothing to distinguish. "
                "Give at least two; a folder needs one folder for each class."
            )
        for key, value in (("mixup", mixup), ("cutmix", cutmix)):
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ConfigurationError(f"task.options.{key}: {value!r} is not a number of 0 or more.")
        if type(top_k) is not int or top_k < 0:
            raise ConfigurationError(f"task.options.top_k: {top_k!r} is not a whole number of 0 or more.")
        if type(multi_label) is not bool:
            raise ConfigurationError(f"task.options.multi_label: {multi_label!r} should be true or false.")
        classes = train_set.classes
        self.labels: SingleLabel | MultiLabel = MultiLabel(classes) if multi_label else SingleLabel(classes, top_k)
        self.labels.check(labels_of(train_set))
        self.best = self.labels.best
        self.mixup, self.cutmix = float(mixup), float(cutmix)
        self.class_weights = checked_class_weights(class_weights, train_set)
        self.classes, self.sample_shape = train_set.classes, train_set.sample_shape
        self.mean, self.std = train_set.mean, train_set.std
        self.crop_padding, self.flip, self.cutout = recipe.data.crop_padding, recipe.data.flip, recipe.data.cutout
        self.crop_reflects, self.views = recipe.data.crop_fill == "reflect", recipe.train.eval_views
        side = min(self.sample_shape[1:])
        if self.views == "mirror-translate" and side < 2:
            raise ConfigurationError(
                f"train.eval_views = 'mirror-translate' cannot move images of {side} pixel: set it to 'mirror'."
            )
        if self.crop_reflects and self.crop_padding >= side:
            raise ConfigurationError(
                f"data.crop_padding = {self.crop_padding} cannot mirror images of {side} pixels: set data.crop_fill = "
                "'black', or pad by less than the images' side."
            )
        self.label_smoothing = recipe.train.label_smoothing

    def prepare(
        self, batch: Images | torch.Tensor, draw: Callable[[int], torch.Tensor], *, training: bool
    ) -> Images | torch.Tensor:
        """The images augmented and mixed, if `training`, and normalised; a batch to predict has no labels."""
        if isinstance(batch, torch.Tensor):
            return self._normalised(batch)
        images, labels = batch
        mixes = not self.prepares_alone
        if not training or not (self.crop_padding or self.flip or self.cutout or mixes):
            return self._normalised(images), labels
        u = draw(NUM_UNIFORM + NUM_MIX * mixes)
        images = self._moved_and_normalised(images, u, draw)
        if self.cutout:
            images = cutout(images, self.cutout, u[:, CUTOUT_COLUMNS])
        if mixes:
            targets = functional.one_hot(labels, len(self.classes)).float() if labels.ndim == 1 else labels
            images, labels = mix(images, targets, u[:, NUM_UNIFORM:], mixup=self.mixup, cutmix=self.cutmix)
        return images, labels

    @property
    def prepares_alone(self) -> bool:
        """Whether what `prepare` makes of an image follows from nothing else in its batch."""
        return not (self.mixup > 0 or self.cutmix > 0)

    def _moved_and_normalised(
        self, images: torch.Tensor, u: torch.Tensor, draw: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        """The images cropped, mirrored and normalised, by the sample's numbers `u` (B, NUM_UNIFORM)."""
        mirrored = None
        if self.flip == "alternate":
            mirrored = mirrored_alternately(*_first_side(draw))
        elif self.flip:
            mirrored = mirrored_by_chance(u[:, FLIP_COLUMN])
        padding, reflect, places = self.crop_padding, self.crop_reflects, u[:, CROP_COLUMNS]
        if self.mean is not None and self.std is not None and later.is_asynchronous(images.device):
            return on_device.shown(
                images, self.mean, self.std, padding=padding, reflect=reflect, u=places, mirrored=mirrored
            )
        if padding:
            images = crop(images, padding, places, reflect=reflect)
        return self._normalised(images if mirrored is None else mirror(images, mirrored))

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        if self.mean is None or self.std is None:
            return images
        if later.is_asynchronous(images.device):
            return on_device.shown(images, self.mean, self.std)
        return normalise(images, self.mean, self.std)

    def loss(self, model: nn.Module, batch: Images) -> torch.Tensor:
        """The summed cross-entropy, with class weights and the recipe's label smoothing."""
        return self._losses(model, batch, "sum")

    def losses(self, model: nn.Module, batch: Images) -> torch.Tensor:
        """What `loss` sums, (B,): so that an image that makes it NaN can be named."""
        return self._losses(model, batch, "none")

    def _losses(self, model: nn.Module, batch: Images, reduction: str) -> torch.Tensor:
        images, labels = batch
        scores, weight = self._scores(model, images), None
        if self.class_weights is not None:
            scores = scores if scores.dtype == torch.float64 else scores.float()  # half a type would round the weights
            weight = weights_on(scores.device, scores.dtype, tuple(self.class_weights))
        return self.labels.losses(
            scores, labels, weight=weight, label_smoothing=self.label_smoothing, reduction=reduction
        )

    def score(self, model: nn.Module, batch: Images) -> dict[str, Any]:
        """The loss without smoothing and class weights, and what the metrics follow from."""
        images, labels = batch
        return dict(self.labels.score(self._evaluated(model, images), labels))

    def _evaluated(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The scores, (B, num_classes), as the mean over the views that the recipe evaluates."""
        return over_views(lambda view: self._scores(model, view), images, self.views)

    def _scores(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """(B, num_classes). Raises ConfigurationError for a model that returns something else."""
        scores: Any = model(images)
        needed = (images.shape[0], len(self.classes))  # len() of a tensor is four calls
        if isinstance(scores, torch.Tensor) and scores.shape == needed:
            return scores
        is_tensor = isinstance(scores, torch.Tensor)
        found = f"a tensor of shape {tuple(scores.shape)}" if is_tensor else f"a {type(scores).__name__}"
        raise ConfigurationError(
            f"the model returned {found} for {len(images)} image{'s' if len(images) > 1 else ''}"
            f"{' in training mode (model.train())' if model.training else ''}: it should return a tensor of shape "
            f"{needed}, a score for each of the {needed[1]} classes."
        )

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """See SingleLabel and MultiLabel."""
        return self.labels.metrics(sums, weight)

    def details(self, sums: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """See SingleLabel and MultiLabel."""
        return self.labels.details(sums, weight)

    def headline(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
        """The best metric, with counts and the loss where the details are known."""
        return self.labels.headline(metrics, details)

    def report(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
        """The metrics of each class below those of all."""
        return self.labels.report(metrics, details)

    def predict(self, model: nn.Module, batch: Images | torch.Tensor, *, top: int = 3) -> list[dict[str, Any]]:
        """The `top` most probable classes of each image."""
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        return most_probable(self.classes, self.labels.probabilities(self._evaluated(model, images)), top)

    def in_words(self, prediction: Any) -> str:
        """The classes with their probabilities."""
        return probable_in_words(prediction)

    def read(self, path: str) -> list[torch.Tensor]:
        """The picture at `path`, (C, H, W) uint8, as the data set `folder` reads it. Raises ConfigurationError."""
        channels, height, width = self.sample_shape
        if self.mean is None:
            raise ConfigurationError(
                "the model was trained on floats that its data set made, and how it makes them from a picture is not "
                "known here: give them to the model from Python, or train on bytes (uint8) with data.mean and data.std."
            )
        if channels not in (1, 3):
            raise ConfigurationError(
                f"the model was trained on images of {channels} channels, and pictures are read in 3 (colour) or 1 "
                "(grey)."
            )
        return [read_picture(Path(path), (height, width), channels)]

    def export(self, model: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor]]:
        """From images as the data set holds them to probabilities: see ServedImages."""
        served = ServedImages(model, self.mean, self.std, self.labels.probabilities, self.views).eval()
        return served, (example_images(2, self.sample_shape, are_pixels=self.mean is not None),)

    def export_notes(self) -> dict[str, Any]:
        """What the images and the probabilities are of."""
        return {
            "classes": list(self.classes),
            "sample_shape": list(self.sample_shape),
            "images": "floats, as the data set gives them" if self.mean is None else "pixels from 0 to 255",
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
        }

    def describe(self) -> dict[str, Any]:
        """The name, and whether there are several labels; classes and preparation are compared with the data."""
        return {"name": "image-classification", **({"multi_label": True} if self.best == MultiLabel.best else {})}

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        """`num_classes` and `sample_shape`, (C, H, W)."""
        return {"num_classes": len(self.classes), "sample_shape": self.sample_shape}


def _first_side(draw: Callable[[int], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """A number for each image that no epoch changes, and the epoch. Raises ConfigurationError without a rng.Draw."""
    if not isinstance(draw, rng.Draw):
        raise ConfigurationError("data.flip = 'alternate': the task's prepare has to pass on the draw that it gets.")
    return draw.for_all_epochs(1)[:, 0], draw.epoch
