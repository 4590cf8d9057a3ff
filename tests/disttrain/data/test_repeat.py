"""In exact mode a sample is a function of the seed: a data set that draws from elsewhere is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import disttrain
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from tests.disttrain.parallel.exact_runs import SMALL


class Augmented(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Pictures that are mirrored half of the time, as a generator of some kind says."""

    classes = ("a", "b", "c")

    def __init__(self, flips: Callable[[Augmented], bool], labels: Callable[[Augmented], int] = lambda own: 0) -> None:
        self.generator = np.random.default_rng(0)
        self.flips, self.labels = flips, labels

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.full((3, 4, 4), index, dtype=torch.uint8)
        image[:, :, 0] += 1
        return (image.flip(2) if self.flips(self) else image), (index + self.labels(self)) % 3


@pytest.mark.parametrize(
    ("own", "what"),
    [
        (Augmented(lambda own: own.generator.random() < 0.5), "the image of sample"),
        (Augmented(lambda own: False, lambda own: int(own.generator.integers(3))), "the label of sample"),
    ],
)
@pytest.mark.parametrize("which", ["training", "test"])
def test_a_data_set_with_a_generator_of_its_own_is_refused_by_name(
    tmp_path: Path, own: Augmented, what: str, which: str
) -> None:
    """As Albumentations has: what it draws depends on which worker has read what before."""
    seeded = Augmented(lambda own: torch.rand(()) < 0.4 or random.random() < 0.1 or np.random.rand() < 0.1)
    recipe = load_recipe("digits", [*SMALL[2:], "train.max_steps=1", "data.workers=0"])

    def trained(run_dir: Path, **sets: Augmented) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
        disttrain.train(recipe, run_dir=run_dir, model=model, **{"train_set": seeded, "test_set": seeded, **sets})

    with pytest.raises(
        ConfigurationError, match=f"{what} .* of the {which} set differs when it is read again"
    ) as caught:
        trained(tmp_path / "own", **{"train_set" if which == "training" else "test_set": own})
    assert "seeded for each sample" in str(caught.value)
    trained(tmp_path / "seeded")
