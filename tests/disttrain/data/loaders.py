"""Loaders of images, prepared as the task of image classification does."""

from __future__ import annotations

from typing import Any

from disttrain.data import EvalLoader, Loader, Split, StepSampler
from disttrain.recipe import DataRecipe, Recipe
from disttrain.task import ImageClassification


def image_task(split: Split, data: DataRecipe) -> ImageClassification:
    """The task for a split, with the augmentation of `data`."""
    return ImageClassification(split, Recipe(data=data))


def train_loader(split: Split, sampler: StepSampler, data: DataRecipe, **options: Any) -> Loader:
    """As training has it."""
    return Loader(split, sampler, data, image_task(split, data), **options)


def eval_loader(split: Split, data: DataRecipe, **options: Any) -> EvalLoader:
    """As an evaluation has it."""
    return EvalLoader(split, data, image_task(split, data), **options)
