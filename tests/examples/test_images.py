"""examples/images: a folder of pictures of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.running import few_steps, final_metrics, same_bits, shell

Enter = Callable[[str], Path]
Promised = Callable[[str, str], tuple[str, dict[str, float]]]


def test_pictures(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = enter("images")
    import digits_on_photos
    from sklearn.datasets import load_digits

    digits = load_digits()
    digits.images, digits.target = digits.images[1336:1464], digits.target[1336:1464]
    monkeypatch.setattr(digits_on_photos, "load_digits", lambda: digits)
    digits_on_photos.write_folder(folder / "pictures", num_train=96)
    pictures = sorted(path.parent.name for path in (folder / "pictures/train").rglob("*.png"))
    assert pictures == sorted(map(str, digits.target[:96]))
    assert len(list((folder / "pictures/test").rglob("*.png"))) == 32
    losses, metrics = few_steps(
        "recipe.toml", 12, "train.epochs=12", "train.eval_every_epochs=12", "data.batch_size=32"
    )
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert set(metrics) >= {"loss", "accuracy"}


@pytest.mark.long
def test_what_the_readme_promises(enter: Enter, promised: Promised) -> None:
    enter("images")
    command, expected = promised("images", "recipe.toml")
    assert final_metrics(command)["accuracy"] == pytest.approx(expected["accuracy"], abs=0.04)
    assert same_bits("recipe.toml")
    answers = shell("disttrain predict runs/whole pictures/test/0/*.png --trust --top 1").splitlines()
    assert len([answer for answer in answers if ".png: 0 " in answer]) > 0.8 * len(answers) > 20
