"""`disttrain.train` with what programs bring along: each works, or is one clear line."""

from __future__ import annotations

import inspect
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import disttrain
from disttrain.commands.locate import find_checkpoint
from disttrain.errors import ConfigurationError, RecipeError, UserCodeError
from disttrain.recipe import as_recipe, load_recipe, to_toml

QUIET: dict[str, Any] = {
    "data": {"batch_size": 6},
    "train": {"max_steps": 1, "threads": 1},
    "tracking": {"uri": "none", "system_metrics": False},
}
LABELS = torch.arange(12) % 3
IMAGES = torch.arange(12 * 16).view(12, 1, 4, 4).to(torch.uint8)


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(images.flatten(1))
        return scores


def train(run_dir: Path, recipe: Any = QUIET, **objects: Any) -> disttrain.Result:
    objects = {"model": Tiny(3), "train_set": (IMAGES, LABELS), "test_set": (IMAGES, LABELS)} | objects
    return disttrain.train(recipe, run_dir=run_dir, **objects)


def test_a_recipe_comes_in_any_form(tmp_path: Path) -> None:
    assert train(tmp_path / "run").step == 1
    recipe = as_recipe(QUIET)
    (tmp_path / "mine.toml").write_text(to_toml(recipe))
    for form in (recipe, QUIET, tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
        assert as_recipe(form, ["train.seed=7"]).train.seed == 7
        assert as_recipe(form).data.batch_size == 6
    with pytest.raises(RecipeError, match="a list is not a recipe; give a Recipe, a mapping of its sections, a name"):
        train(tmp_path / "other", [QUIET])
    with pytest.raises(RecipeError, match=r"recipe: data\.batch: .*batch_size"):
        train(tmp_path / "other", {**QUIET, "data": {"batch": 6}})
    assert as_recipe("digits") == load_recipe("digits")


def test_a_class_or_function_makes_the_model(tmp_path: Path) -> None:
    train(tmp_path / "class", model=Tiny)
    train(tmp_path / "function", model=lambda num_classes: Tiny(num_classes))
    torch.manual_seed(0)
    train(tmp_path / "module", model=Tiny(3))
    class_, function, module = (find_checkpoint(tmp_path / name).model for name in ("class", "function", "module"))
    for name, value in class_.items():  # made after the seed was set, as a recipe's model is
        assert torch.equal(value, function[name])
        assert torch.equal(value, module[name])


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"model": "net"}, "model: a str is neither a torch.nn.Module nor a class or function that makes one"),
        ({"train_set": DataLoader(TensorDataset(IMAGES, LABELS))}, "the training set: a DataLoader makes batches"),
        ({"test_set": TensorDataset}, "the test set: TensorDataset makes a data set, but is not one; call it"),
        ({"model": Tiny(3).double()}, "fails on a batch of images .*: RuntimeError: mat1 and mat2 must have the same"),
    ],
)
def test_what_does_not_fit_is_one_line_and_few_frames(tmp_path: Path, objects: dict[str, Any], message: str) -> None:
    before = sys.excepthook
    with pytest.raises(ConfigurationError, match=message) as caught:
        train(tmp_path, **objects)
    assert sys.excepthook is before  # torch's own would print "[rank0]: " before each line
    shown = "".join(traceback.format_exception(caught.value))
    assert len(shown.splitlines()) < 15
    assert "direct cause" not in shown


def test_a_process_group_of_the_program_is_left_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigurationError, match="this process already has a process group"):
            train(tmp_path)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_another_default_type_of_the_program_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "usual", model=Tiny)
    torch.set_default_dtype(torch.float64)
    try:
        train(tmp_path / "double", model=Tiny)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    usual, double = (find_checkpoint(tmp_path / name).model for name in ("usual", "double"))
    assert all(torch.equal(usual[name], value) for name, value in double.items())


class Broken:
    """Its sample 7 raises."""

    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return IMAGES[index], 0 if index != 7 else [][index]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_of_a_data_set_names_its_sample_and_its_place(tmp_path: Path, workers: int) -> None:
    recipe = {**QUIET, "data": {"batch_size": 12, "workers": workers}}
    line = next(
        number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "else [][index]" in text
    )
    with pytest.raises(UserCodeError) as caught:
        train(tmp_path, recipe, train_set=Broken())
    assert str(caught.value) == (
        f"sample 7 of the training set: IndexError: list index out of range ({__file__}:{line})"
    )
    assert "in __getitem__" in "".join(traceback.format_exception(caught.value))
    assert "in __getitem__" in (tmp_path / "logs" / "worker-0.log").read_text()


def test_train_is_a_function_at_every_access() -> None:
    assert disttrain.train is disttrain.train
    assert pickle.loads(pickle.dumps(disttrain.train)) is disttrain.train
    assert {"task", "model", "train_set", "test_set"} <= set(inspect.signature(disttrain.train).parameters)


def test_a_metric_that_the_task_has_not_is_named_with_those_it_has() -> None:
    result = disttrain.Result(Path("run"), 1, {"loss": 0.5, "mae": 0.25})
    assert result.loss == 0.5
    assert not hasattr(result, "accuracy")
    with pytest.raises(AttributeError, match=r"no metric 'accuracy'; Result\.metrics has loss, mae$"):
        _ = result.accuracy
