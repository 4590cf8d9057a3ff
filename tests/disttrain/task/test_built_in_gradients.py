"""The built-in tasks: gradients are those of one process, however a step is shared, and metrics the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import weights_sha256
from disttrain.data import StepSampler
from disttrain.data.sources.text import load_text
from disttrain.models.gpt import GPT
from disttrain.models.mlp import Mlp
from disttrain.recipe import DataRecipe, Recipe
from disttrain.task import ImageClassification
from disttrain.task.language import LanguageModeling
from disttrain.task.tabular import Tabular
from disttrain.testing import run_workers
from tests.disttrain.task.test_images import NUM_CLASSES, pictures, split
from tests.disttrain.task.test_tabular import people
from tests.disttrain.task.test_users_tasks import QUIET

TEXT = "The cat sat on the mat. It was a small, black cat, and an old mat."
WHOLE = {"data": {"batch_size": 16, "crop_padding": 0, "flip": False}}


class InDouble(nn.Module):
    """Computes in the type of its weights, at first float64, whatever it is given."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.body(inputs.to(next(self.parameters()).dtype))
        return outputs


@dataclass(frozen=True)
class Job:
    """What is trained, and its batches of samples by number."""

    task: disttrain.Task
    model: nn.Module
    train_set: Any
    test_set: Any
    batch: Callable[[list[int]], Any]
    num: int


def language(root: Path, layout: str) -> Job:
    """Texts of 3 to 66 characters; in packed blocks there are several, and padded ones differ in length."""
    options = {"test_files": "2?.txt", "context_length": 12 if layout == "packed" else 80, "layout": layout}
    sets = load_text(DataRecipe(dataset="text", root=str(root), options=options))
    task = LanguageModeling(sets.train)
    model = GPT(**task.model_arguments(sets.train), num_layers=1, num_heads=2, dim=8).double()
    data = sets.train.dataset
    return Job(task, model, sets.train, sets.test, lambda chosen: task.collate([data[i] for i in chosen]), len(data))


def tabular(root: Path, kind: str) -> Job:
    sets = people(kind)
    task = Tabular(sets.train)
    model = InDouble(Mlp(3, sets.train.facts["num_outputs"], widths=(8,)))
    data = sets.train.dataset
    return Job(task, model, sets.train, sets.test, lambda chosen: task.collate([data[i] for i in chosen]), len(data))


def images(root: Path, kind: str) -> Job:
    options: dict[str, Any] = {"multi_label": True} if kind == "multi" else {"class_weights": "balanced"}
    data, recipe = split(kind), Recipe.model_validate(WHOLE)
    task = ImageClassification(data, recipe, **options)
    body = InDouble(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, NUM_CLASSES)))

    def batch(chosen: list[int]) -> Any:
        both = data.images[chosen], data.labels[chosen]
        return task.prepare(both, lambda num: torch.zeros(len(chosen), num), training=True)

    return Job(task, body, pictures(kind), pictures(kind, 31), batch, len(data))


JOBS: dict[str, tuple[Callable[[Path, str], Job], str]] = {
    "packed-text": (language, "packed"),
    "padded-text": (language, "padded"),
    "quantities": (tabular, "regression"),
    "classes": (tabular, "classification"),
    "images": (images, "single"),
    "soft-labels": (images, "soft"),
    "several-labels": (images, "multi"),
}


def made(root: Path, name: str) -> Job:
    torch.manual_seed(0)
    make, kind = JOBS[name]
    return make(root, kind)


def by_hand(one: Job) -> dict[str, torch.Tensor]:
    """The weights after an epoch of whole batches, without any of the machinery."""
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.01)
    for chosen in StepSampler(one.num, batch_size=16).order(0).split(16):
        batch = one.batch(chosen.tolist())
        weight = one.task.weight(batch)
        (one.task.loss(one.model, batch) / (len(chosen) if weight is None else weight)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.detach() for key, value in one.model.state_dict().items()}


Trained = dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]


def trained(root: Path, folder: Path, accumulate: int) -> Trained:
    """The weights of each job after an epoch, and its metrics before it: of the same weights everywhere."""
    found = {}
    for name in JOBS:
        one = made(root, name)
        objects = {"task": one.task, "model": one.model, "train_set": one.train_set, "test_set": one.test_set}
        overrides = [f"train.accumulate={accumulate}", "data.crop_padding=0", "data.flip=false"]
        still = [*overrides, "optim.lr=0", "train.max_steps=1"]
        metrics = disttrain.train(QUIET, overrides=still, run_dir=folder / f"still-{name}", **objects).metrics
        disttrain.train(QUIET, overrides=overrides, run_dir=folder / name, **objects)
        found[name] = {key: value.detach() for key, value in one.model.state_dict().items()}, metrics
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(1, 23):
        (folder / f"{number:02}.txt").write_text(TEXT[: number * 3])
    return folder


def test_weights_are_those_of_one_process_and_metrics_the_same_everywhere(root: Path, tmp_path: Path) -> None:
    """The last step has fewer samples, tokens are counted unequally, and each worker has one or two micro-batches."""
    expected = {name: by_hand(made(root, name)) for name in JOBS}
    metrics: dict[str, dict[str, float]] = {}
    for size, accumulate in ((2, 1), (3, 2)):
        arguments = root, tmp_path / str(size), accumulate
        everyones: list[Trained] = run_workers(trained, size, args=arguments, process_group=False)
        for name, (weights, measured) in everyones[0].items():
            assert weights.keys() == expected[name].keys()
            for key, value in expected[name].items():
                torch.testing.assert_close(
                    weights[key], value, rtol=1e-12, atol=1e-14, msg=f"{name} {key}, {size} workers"
                )
            assert measured == metrics.setdefault(name, measured), f"{name}, {size} workers"
            assert all(of_rank[name][1] == measured for of_rank in everyones)


def test_half_precision_has_the_same_bits_everywhere(root: Path, tmp_path: Path) -> None:
    """In float16, with its scaled gradients, and bfloat16: text of unequal numbers of tokens, and rows."""

    def bits(folder: Path) -> dict[tuple[str, str], tuple[str, dict[str, float]]]:
        found = {}
        for name in ("padded-text", "classes"):
            for precision in ("fp32", "fp16", "bf16"):
                one, run_dir = made(root, name), folder / f"{name}-{precision}"
                objects = {"task": one.task, "train_set": one.train_set, "test_set": one.test_set}
                overrides = [f"train.precision={precision}", "parallel.exact=true", "train.max_steps=3"]
                model = one.model.float()
                result = disttrain.train(QUIET, overrides=overrides, run_dir=run_dir, model=model, **objects)
                found[name, precision] = weights_sha256(model.state_dict()), result.metrics
        return found

    expected, other = run_workers(bits, 2, args=(tmp_path / "2",), process_group=False)
    assert other == expected
    assert bits(tmp_path / "1") == expected
    assert len({weights for weights, _ in expected.values()}) == len(expected)
    for _, metrics in expected.values():
        assert all(math.isfinite(value) for value in metrics.values())
