"""Several views of an image: what is averaged, and that an evaluation and the exported model average alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from disttrain.data import as_datasets
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.task import ImageClassification
from disttrain.task.views import over_views


def lopsided() -> nn.Module:
    """A model that takes an image and its mirror image for two things."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 4)).double().eval()


@pytest.mark.parametrize("views", ["one", "mirror", "mirror-translate"])
def test_scores_are_the_mean_over_the_views(views: str) -> None:
    model, images = lopsided(), torch.randn(5, 1, 6, 6, dtype=torch.float64)
    padded = functional.pad(images, (1, 1, 1, 1), "reflect")
    seen = {
        "one": [(images, 1.0)],
        "mirror": [(images, 0.5), (images.flip(3), 0.5)],
        "mirror-translate": [
            (images, 0.25), (images.flip(3), 0.25),
            (padded[..., :6, :6], 0.125), (padded[..., :6, :6].flip(3), 0.125),
            (padded[..., 2:, 2:], 0.125), (padded[..., 2:, 2:].flip(3), 0.125),
        ],
    }  # fmt: skip
    expected: Any = sum(weight * model(view) for view, weight in seen[views])
    assert torch.allclose(over_views(model, images, views), expected)


def test_evaluation_prediction_and_export_see_the_same_views() -> None:
    pixels = torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8)
    labels = torch.arange(8) % 4
    recipe = load_recipe("digits", ["train.eval_views=mirror-translate"])
    data = as_datasets((pixels, labels), (pixels, labels), recipe.data)
    task, model = ImageClassification(data.train, recipe), lopsided().float()
    images, _ = task.prepare((pixels, labels), lambda num: torch.zeros(8, num), training=False)
    with torch.no_grad():
        logits = over_views(model, images, "mirror-translate")
        expected = functional.cross_entropy(logits, labels, reduction="sum")
        assert torch.allclose(task.score(model, (images, labels))["loss"], expected)
        served, _ = task.export(model)
        assert torch.allclose(served(pixels.float()), logits.softmax(1), atol=1e-6)
        best = task.predict(model, images, top=1)[0]["classes"][0]["probability"]
        assert best == pytest.approx(logits[0].softmax(0).max().item())


def test_images_of_one_pixel_cannot_be_moved() -> None:
    pixels, labels = torch.zeros(4, 1, 1, 1, dtype=torch.uint8), torch.arange(4) % 2
    recipe = load_recipe("digits", ["train.eval_views=mirror-translate", "data.crop_padding=0"])
    with pytest.raises(ConfigurationError, match=r"train\.eval_views = 'mirror-translate' cannot move images of 1 pix"):
        ImageClassification(as_datasets((pixels, labels), (pixels, labels), recipe.data).train, recipe)
