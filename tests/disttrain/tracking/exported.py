"""Classifiers of images, exported as training does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from disttrain.data import SplitOutline
from disttrain.recipe import Recipe
from disttrain.task import ImageClassification
from disttrain.tracking.export import export_model


def image_task(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, classes: Sequence[str], shape: tuple[int, int, int]
) -> ImageClassification:
    """The task of images like these; without `mean` and `std` of floats."""
    dtype = torch.float32 if mean is None else torch.uint8
    return ImageClassification(SplitOutline(tuple(classes), shape, dtype, mean, std), Recipe())


def export_images(
    folder: Path,
    module: nn.Module,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    classes: Sequence[str],
    shape: tuple[int, int, int],
) -> str | None:
    """`export_model` of a classifier."""
    task = image_task(mean, std, classes, shape)
    return export_model(folder, module, task.export, task.export_notes)
