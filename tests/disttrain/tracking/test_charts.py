from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from disttrain.runs.journal import Journal, read_journal
from disttrain.tracking.charts import confusion_matrix, draw_charts, per_class
from disttrain.tracking.learning_curves import learning_curves


def texts(figure: object) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))  # type: ignore[attr-defined]


def colours(path: Path) -> int:
    """Distinct colours of a picture; an empty one has one."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(2**24) or [])


def test_draws_what_the_run_has_data_for(run_dir: Path) -> None:
    assert draw_charts(run_dir) == []
    journal = Journal(run_dir / "journal.jsonl")
    for step in range(0, 1000, 10):
        journal.metrics(step, {"train/loss": 2 / (1 + step), "train/lr": 0.1, "train/images_per_second": 500.0})
    journal.event("resume", step=500)
    journal.metrics(1000, {"train/loss": math.nan, "eval/loss": 0.5, "eval/accuracy": 0.75})
    journal.close()
    evaluation = {"classes": ["cat", "dog"], "per_class": {"cat": 0.9, "dog": None}, "confusion": [[9, 1], [0, 0]]}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    drawn = draw_charts(run_dir)
    assert [path.name for path in drawn] == ["learning_curves.png", "confusion_matrix.png", "per_class.png"]
    assert all(colours(path) > 20 for path in drawn)
    assert sorted(path.name for path in (run_dir / "charts").iterdir()) == sorted(path.name for path in drawn)


def test_learning_curves_say_what_is_best() -> None:
    figure = learning_curves(
        [
            {"kind": "metrics", "step": 100, "metrics": {"eval/accuracy": 0.5, "eval/loss": 1.0}},
            {"kind": "metrics", "step": 200, "metrics": {"eval/accuracy": 0.625, "eval/loss": 0.9}},
            {"kind": "metrics", "step": 300, "metrics": {"eval/accuracy": 0.6, "eval/loss": 0.8}},
        ]
    )
    assert figure is not None
    assert "Accuracy: best 62.50 % at step 200" in texts(figure)
    assert figure.axes[0].get_title(loc="left") == "Loss"
    assert learning_curves([]) is None


@pytest.mark.parametrize("loss", [-2e6, -0.0042085, -4.2623e-12])
def test_what_is_written_around_a_panel_is_in_its_part_of_the_picture(loss: float) -> None:
    metrics = {"train/samples_per_second": 123456789.0, "eval/" + 12 * "a_long_name_": -1e-7}
    curves = learning_curves(
        {"kind": "metrics", "step": step, "metrics": {**metrics, "train/loss": loss * (1 + step / 1e10)}}
        for step in (10**5, 10**6)
    )
    for figure, columns in ((curves, 2), (confusion_matrix([[6 * 10**8, 1], [2, 6 * 10**8]], ["a", "b"]), 1)):
        assert figure is not None
        figure.canvas.draw()
        width = figure.bbox.width / columns
        for index, axes in enumerate(figure.axes[: 3 if columns == 2 else 1]):
            box, left = axes.get_tightbbox(), index % columns * width  # with all that is written around it
            assert box is not None
            assert left <= box.x0 < box.x1 <= left + width, texts(axes)


def test_metrics_of_any_name_have_panels_of_their_own(run_dir: Path) -> None:
    journal = Journal(run_dir / "journal.jsonl")
    for step in (1, 2):
        journal.metrics(step, {"train/loss": 2.0, "train/grad_norm": 0.5, "train/epoch": step, "system/node0/cpu": 3.0})
        journal.metrics(step, {"train/learning_rate": 0.1, "train/learning_rate_group_1": 0.2, "train/word_error": 0.4})
        journal.metrics(step, {"train/tokens_per_second": 9.0, "eval/perplexity": 7.25, "eval/word_error": math.nan})
    journal.close()
    (run_dir / "evaluation.json").write_text(json.dumps({"step": 2, "metrics": {"perplexity": 7.25}}))
    assert [path.name for path in draw_charts(run_dir)] == ["learning_curves.png"], "there is no confusion to draw"
    figure = learning_curves(read_journal(run_dir / "journal.jsonl"))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss", "Perplexity: 7.25 at step 2", "Word error", "Grad norm", "Learning rate", "Tokens per second",
    ]  # fmt: skip
    assert "group 1" in texts(figure)


@pytest.mark.parametrize("num", [2, 10, 37, 100])
def test_confusion_matrix_of_any_number_of_classes(num: int) -> None:
    matrix = [[90 if i == j else (i + j) % 3 for j in range(num)] for i in range(num)]
    figure = confusion_matrix(matrix, [f"class {i}" for i in range(num)])
    total = sum(map(sum, matrix))
    assert f"{90 * num:,} of {total:,} right" in texts(figure)
    assert ("90" in texts(figure).split("\n")) == (num <= 20)


def test_per_class_shows_the_best_and_the_worst_of_many() -> None:
    figure = per_class([i / 100 for i in range(100)], [f"class {i}" for i in range(100)])
    words = texts(figure)
    assert "class 99" in words
    assert "class 0" in words
    assert "class 50" not in words
    assert "60 classes between" in words


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 by 3"):
        confusion_matrix([[1, 2], [3, 4]], ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 accuracies do not fit 1 classes"):
        per_class([0.1, 0.2], ["a"])
