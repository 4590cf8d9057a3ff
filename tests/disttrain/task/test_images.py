"""Image classification with labels of several kinds, class weights, mixtures and the best k."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import disttrain
from disttrain import rng
from disttrain.data import MemorySplit
from disttrain.data.sources.custom import as_datasets
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe, Recipe, load_recipe
from disttrain.task.images import ImageClassification
from disttrain.testing import run_workers
from disttrain.tracking.charts import draw_charts
from tests.disttrain.parallel.exact_runs import SMALL, build, outcome

NUM_CLASSES = 7
RECIPE = Recipe()


def pictures(kind: str, num: int = 70, num_classes: int = NUM_CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of bytes with labels of a kind: "single", "soft" or "multi"."""
    generator = torch.Generator().manual_seed(num)
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=generator)
    if kind == "single":
        return images, torch.randint(0, num_classes, (num,), generator=generator)
    if kind == "soft":
        return images, torch.rand(num, num_classes, generator=generator).softmax(1)
    return images, (torch.rand(num, num_classes, generator=generator) < 0.3).long()


def split(kind: str, num: int = 70) -> MemorySplit:
    pair = pictures(kind, num)
    found = as_datasets(pair, pair, DataRecipe()).train
    assert isinstance(found, MemorySplit)
    return found


def task_of(kind: str = "single", **options: Any) -> ImageClassification:
    return ImageClassification(split(kind), RECIPE, **options)


def drawing(samples: torch.Tensor) -> Callable[[int], torch.Tensor]:
    return lambda num: rng.uniform(0, 0, samples, num)


class Scores(nn.Module):
    """Gives the scores that it was made with, whatever it sees."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scores[: len(images)]


def scores(num: int) -> torch.Tensor:
    return torch.randn(num, NUM_CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_label_is_the_same_as_the_certainty_of_it() -> None:
    images, labels = pictures("single")
    certain = functional.one_hot(labels, NUM_CLASSES).double()
    task, model = task_of(), Scores(scores(70))
    wanted = functional.cross_entropy(scores(70), labels, reduction="sum")
    assert torch.equal(task.loss(model, (images, labels)), wanted)
    assert task.loss(model, (images, certain)).item() == pytest.approx(wanted.item(), abs=1e-12)
    hard, soft = (task.metrics(task.score(model, (images, one)), 70) for one in (labels, certain.float()))
    assert hard == pytest.approx(soft)


def test_class_weights_multiply_each_class_and_the_number_of_images_divides() -> None:
    images, labels = pictures("single")
    weights = [0.0, 1.0, 2.0, 0.5, 1.0, 3.0, 1.0]
    model = Scores(scores(70))
    each = functional.cross_entropy(scores(70), labels, reduction="none")
    wanted = (each * torch.tensor(weights)[labels]).sum()
    assert task_of(class_weights=weights).loss(model, (images, labels)).item() == pytest.approx(wanted.item())
    balanced = task_of(class_weights="balanced")
    assert balanced.class_weights is not None
    assert torch.tensor(balanced.class_weights)[labels].mean().item() == pytest.approx(1)
    learned = scores(70).requires_grad_()
    others = task_of(class_weights=[0.25, *weights[1:]])
    with torch.inference_mode():  # as a user's hook may have it, before a step asks for them
        others.loss(model, (images, labels))
    others.loss(Scores(learned), (images, labels)).backward()
    # An evaluation counts every image alike.
    plain, weighted = (task.score(model, (images, labels))["loss"] for task in (task_of(), balanced))
    assert torch.equal(plain, weighted)


def test_scores_of_half_a_type_round_no_class_weights() -> None:
    batch, model = pictures("single"), Scores(scores(70).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        plain = task_of().loss(model, batch).item()
        weighted = task_of(class_weights=[1.2345] * NUM_CLASSES).loss(model, batch).item()
    assert weighted == pytest.approx(1.2345 * plain, rel=1e-5)


def test_the_best_k_are_a_metric_where_there_are_more_classes() -> None:
    images, labels = pictures("single")
    model = Scores(scores(70))
    metrics = task_of(top_k=3).metrics(task_of(top_k=3).score(model, (images, labels)), 70)
    ranks = (scores(70) > scores(70).gather(1, labels[:, None])).sum(1)
    assert metrics["top3_accuracy"] == (ranks < 3).double().mean().item()
    assert metrics["accuracy"] == (ranks < 1).double().mean().item()
    assert "top5_accuracy" in task_of().metrics(task_of().score(model, (images, labels)), 70)
    for few in (0, NUM_CLASSES):
        task = task_of(top_k=few)
        assert set(task.metrics(task.score(model, (images, labels)), 70)) == {"accuracy", "loss"}


def test_several_labels_are_learned_by_binary_cross_entropy() -> None:
    images, labels = pictures("multi")
    task = task_of("multi", multi_label=True)
    assert task.best == ("mean_average_precision", "max")
    loss = task.loss(Scores(scores(70)), (images, labels.float()))
    mean = functional.binary_cross_entropy_with_logits(scores(70), labels.double())
    assert loss.item() == pytest.approx(70 * mean.item())
    answer = task.predict(Scores(scores(70)), images[:1], top=2)[0]["classes"]
    best, second = scores(70)[0].sigmoid().topk(2).values.tolist()
    assert [guess["probability"] for guess in answer] == [best, second]


def test_mixtures_follow_from_the_sample_and_leave_augmentation_as_it_was() -> None:
    images, labels = pictures("single", 16)
    recipe = load_recipe("digits", ["data.flip=true", "data.crop_padding=3"])
    data = split("single", 16)
    plain = ImageClassification(data, recipe)
    mixed = ImageClassification(data, recipe, mixup=0.4, cutmix=1.0)
    draw = drawing(torch.arange(16))
    ours, targets = mixed.prepare((images, labels), draw, training=True)
    again, _ = mixed.prepare((images, labels), draw, training=True)
    assert torch.equal(ours, again)
    assert targets.shape == (16, NUM_CLASSES)
    assert (targets.amax(1) < 1).sum() > 4
    # Each is a mixture of augmented images: one that was left alone is what augmentation alone makes of it.
    whole, _ = plain.prepare((images, labels), draw, training=True)
    assert (ours <= whole.amax(0) + 1e-5).all()
    assert (ours >= whole.amin(0) - 1e-5).all()
    for task in (plain, mixed):
        seen, same = task.prepare((images, labels), draw, training=False)
        assert torch.equal(same, labels)
        assert torch.equal(seen, plain.prepare((images, labels), draw, training=False)[0])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("single", {"mixup": -1}, "task.options.mixup: -1 is not a number of 0 or more."),
        ("single", {"cutmix": True}, "task.options.cutmix: True is not a number of 0 or more."),
        ("single", {"top_k": 1.5}, "task.options.top_k: 1.5 is not a whole number of 0 or more."),
        ("single", {"class_weights": [1.0]}, "task.options.class_weights: [1.0] is neither \"balanced\" nor"),
        ("single", {"class_weights": 3}, "task.options.class_weights: 3 is neither \"balanced\" nor a list"),
        ("single", {"class_weights": "even"}, "task.options.class_weights: 'even' is neither \"balanced\" nor a list"),
        ("single", {"multi_label": True}, "task.options.multi_label: labels are (70,), and should be (images, 7), 1"),
        ("soft", {"multi_label": True}, "task.options.multi_label: labels have to be 0 or 1, and some are neither."),
        ("multi", {}, "label 0 adds up to "),
    ],
)  # fmt: skip
def test_options_and_labels_that_do_not_fit_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        task_of(kind, **options)
    assert str(caught.value).startswith(message)


def test_labels_of_another_shape_are_refused_where_they_come_from() -> None:
    images, labels = pictures("soft", 8)
    for wrong, message in (
        (labels * 9, r"label 0 holds a number outside 0\.\.1"),
        (labels[:7], r"labels must be \(8,\) int64, one per image, or \(8, 7\) float32"),
    ):
        with pytest.raises(ConfigurationError, match=f"the training set: {message}"):
            as_datasets((images, wrong), (images, labels), DataRecipe())
    streamed = as_datasets([*zip(images, labels, strict=True)], [*zip(images, labels, strict=True)], DataRecipe()).train
    assert streamed.classes == tuple(map(str, range(NUM_CLASSES)))
    assert torch.equal(streamed.dataset[3][1], labels[3])


JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mixtures": (
        "soft",
        ("task.options={mixup=0.4, cutmix=1.0, class_weights='balanced'}", "data.flip=true", "train.accumulate=3"),
    ),
    "several-labels": (
        "multi",
        ("task.options={multi_label=true}", "data.layout=stream", "data.workers=0", "train.precision=bf16"),
    ),
}


def train(run_dir: Path, job: str, max_steps: int = 1000) -> None:
    kind, overrides = JOBS[job]
    recipe = load_recipe(
        "digits",
        [
            *(one for one in SMALL if not one.startswith(("data.options", "train.epochs"))),
            *("data.dataset=digits", "schedule.name=constant", f"train.max_steps={max_steps}", "train.epochs=1"),
            *overrides,
        ],
    )
    torch.manual_seed(0)
    sets = pictures(kind), pictures(kind, 31)
    disttrain.train(recipe, run_dir=run_dir, model=build(NUM_CLASSES, (3, 32, 32)), train_set=sets[0], test_set=sets[1])


@pytest.mark.parametrize("job", JOBS)
def test_every_number_of_workers_gives_the_same_bits_also_across_a_resume(tmp_path: Path, job: str) -> None:
    run_workers(train, 1, args=(tmp_path / "1", job), process_group=False)
    run_workers(train, 2, args=(tmp_path / "2", job, 2), process_group=False)
    run_workers(train, 3, args=(tmp_path / "2", job), process_group=False)
    alone, resumed = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    assert (resumed.weights, resumed.evaluation) == (alone.weights, alone.evaluation)
    assert math.isfinite(alone.evaluation["metrics"]["loss"])
    assert tmp_path / "1" / "charts" / "per_class.png" in draw_charts(tmp_path / "1")
