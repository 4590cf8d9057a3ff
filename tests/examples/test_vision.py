"""examples/vision: a detector of torchvision's, and a segmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.examples.running import few_steps, final_metrics, same_bits

Enter = Callable[[str], Path]
Promised = Callable[[str, str], tuple[str, dict[str, float]]]
SMALL = ("data.options={num_train=64, num_test=8}", "train.eval_batch_size=4")


def test_detection(enter: Enter) -> None:
    enter("vision")
    losses, metrics = few_steps("detection.toml", 8, *SMALL, "optim.lr=1e-3", "schedule.warmup_epochs=0")
    assert sum(losses[-2:]) < sum(losses[:2])
    assert set(metrics) == {"map50"}


def test_segmentation(enter: Enter) -> None:
    enter("vision")
    losses, metrics = few_steps("segmentation.toml", 8, *SMALL)
    assert losses[-1] < 0.9 * losses[0] < 3  # of a pixel, not of a scene
    assert 0 < metrics["miou"] < 1

    from segmentation import Segmentation

    pairs = torch.zeros(11, 11, dtype=torch.int64)
    pairs[0, 0], pairs[0, 1], pairs[1, 1] = 6, 1, 3  # paper: 6 of 7 in the union; ones: 3 of 4
    found = Segmentation().metrics({"loss": torch.tensor(5.0), "pairs": pairs.flatten()}, 10)
    assert found == {"loss": 0.5, "miou": pytest.approx((6 / 7 + 3 / 4) / 2)}


def test_boxes_are_where_the_digits_are(enter: Enter) -> None:
    enter("vision")
    from scenes import load

    train, _ = load(num_train=20, num_test=1)
    for scene in train:
        where = torch.zeros_like(scene["classes"])
        for (left, top, right, bottom), label in zip(
            scene["boxes"].int().tolist(), scene["labels"].tolist(), strict=True
        ):
            inside = scene["classes"][top:bottom, left:right]
            assert {label} == set(inside.unique().tolist()) - {0}
            assert all((inside[edge] == label).any() for edge in (0, -1))
            where[top:bottom, left:right] = 1
        assert not scene["classes"][where == 0].any()


def test_average_precision(enter: Enter) -> None:
    enter("vision")
    from detection import average_precision

    def boxes(*left: int) -> torch.Tensor:
        return torch.tensor([[one, 0.0, one + 10.0, 10.0] for one in left]).reshape(-1, 4)

    def scene(
        found: dict[int, float], wanted: tuple[int, ...]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        ones = torch.ones(len(found), dtype=torch.int64)
        return (
            {"boxes": boxes(*found), "scores": torch.tensor(list(found.values())), "labels": ones},
            {"boxes": boxes(*wanted), "labels": torch.ones(len(wanted), dtype=torch.int64)},
        )

    assert average_precision([scene({0: 0.9, 20: 0.8}, (0, 20))], 1) == 1.0
    assert average_precision([scene({}, (0,))], 1) == 0.0
    # Hit, second box at the same place (a miss), hit: precisions 1 and 2/3 at recalls 1/3 and 2/3; one is never found.
    found = [scene({0: 0.9, 1: 0.8}, (0, 40)), scene({3: 0.7}, (0,))]
    assert average_precision(found, 1) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision(found, 2) == 0.0
    assert average_precision([scene({6: 0.9}, (0,))], 1) == 0.0  # an overlap of a quarter


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["detection.toml", "segmentation.toml"])
def test_what_the_readme_promises(recipe: str, enter: Enter, promised: Promised) -> None:
    enter("vision")
    command, expected = promised("vision", recipe)
    assert final_metrics(command) == pytest.approx(expected, abs=0.12)
    assert same_bits(recipe)
