"""Objects that a program gives, and what a run of them is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset

import disttrain
from disttrain.data import SampleSet
from disttrain.errors import ConfigurationError
from disttrain.models.net import Net
from disttrain.recipe import Recipe, parse_recipe
from disttrain.training.given import Given
from tests.disttrain.training.test_train import network, samples

SHORT = {"train": {"max_steps": 1, "device": "cpu"}, "tracking": {"uri": "none", "system_metrics": False}}


class Cells(Dataset):  # type: ignore[type-arg]
    classes = ("a", "b", "c")

    def __init__(self) -> None:
        self.images, self.labels = samples(40)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


ROWS = [(torch.ones(3), torch.tensor(0.5))] * 6
AS_DICTS = [{"text": "a", "label": 1}] * 6


@pytest.mark.parametrize("found", [ROWS, AS_DICTS, (torch.ones(6, 3), torch.rand(6)), SampleSet(ROWS)])
def test_samples_of_another_kind_without_a_task_have_the_default_named(tmp_path: Path, found: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"'image-classification'.* task=…, or set task\.name\.$"):
        disttrain.train(SHORT, run_dir=tmp_path, model=Net, train_set=found, test_set=found)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (Given(), "net-digits"),
        (Given(model=Net, train_set=samples(4)), "net"),
        (Given(model=torch.nn.Linear(1, 1), train_set=Cells()), "linear-cells"),
        (Given(model=lambda num_classes: None, train_set=Subset(Subset(Cells(), [0, 1]), [0])), "lambda-cells"),
    ],
)
def test_a_run_without_a_name_is_called_after_what_it_trains(given: Given, name: str) -> None:
    assert given.run_name(Recipe()) == name
    named = parse_recipe({"model": {"name": "my_package.nets:Wide_Net"}, "data": {"dataset": "cifar10"}})
    assert Given().run_name(named) == "wide_net-cifar10"


def test_its_folder_and_its_first_line_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = disttrain.train(SHORT, model=network, train_set=Cells(), test_set=Cells())
    assert result.run_dir.name.startswith("network-cells-2")
    assert "network-cells: Sequential (" in (said := capsys.readouterr().out)
    assert " parameters) on Cells (40 training, 40 test samples)\n" in said
    named = disttrain.train({"name": "mine", **SHORT}, model=network, train_set=samples(40), test_set=samples(31, 1))
    assert named.run_dir.name.startswith("mine-2")
    assert " parameters) on 40 training and 31 test samples\n" in capsys.readouterr().out
