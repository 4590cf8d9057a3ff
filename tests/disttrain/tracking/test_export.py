from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import Tensor, nn

from disttrain.task.served_images import example_images
from disttrain.tracking.export import warm_up
from tests.disttrain.tracking.exported import export_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def test_plain_pytorch_predicts_the_same_at_any_batch_size(tmp_path: Path) -> None:
    module = network()
    assert export_images(tmp_path / "model", module, MEAN, STD, [str(i) for i in range(10)], (3, 16, 16)) is None
    assert module.training, "the module that goes on training was changed"
    exported = torch.export.load(tmp_path / "model" / "model.pt2").module()
    module.eval()
    for num in (1, 2, 7):
        images = torch.randint(0, 256, (num, 3, 16, 16)).float()
        normalised = ((images / 255) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        expected = torch.softmax(module(normalised), dim=1)
        torch.testing.assert_close(exported(images), expected)


def test_images_that_are_floats_already_are_left_as_they_are(tmp_path: Path) -> None:
    module = network()
    assert export_images(tmp_path / "model", module, None, None, ["x"] * 10, (3, 16, 16)) is None
    exported = torch.export.load(tmp_path / "model" / "model.pt2").module()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(exported(images), torch.softmax(module.eval()(images), dim=1))


def test_the_folder_need_not_be_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the path itself, torch's C++ code would abort the process."""

    def save(_program: object, file: IO[bytes]) -> None:
        file.write(b"exported")

    monkeypatch.setattr(torch.export, "save", save)
    folder = tmp_path / os.fsdecode(b"\xff")
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert export_images(folder, module, None, None, ["a", "b"], (1, 2, 2)) is None
    assert (folder / "model.pt2").read_bytes() == b"exported"


def test_nothing_in_the_file_is_a_pickle_of_code(tmp_path: Path) -> None:
    export_images(tmp_path / "model", network(), MEAN, STD, ["x"] * 10, (3, 16, 16))
    with zipfile.ZipFile(tmp_path / "model" / "model.pt2") as archive:
        configs = [name for name in archive.namelist() if name.endswith("_config.json")]
        assert configs
        for name in configs:
            assert all(not entry["use_pickle"] for entry in json.loads(archive.read(name))["config"].values())


class Undecided(nn.Module):
    """Its way depends on the values, which a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits if logits.sum().item() > 0 else -logits


def test_a_module_that_cannot_be_exported_leaves_its_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    module = Undecided()
    reason = export_images(tmp_path / "model", module, MEAN, STD, ["a", "b"], (3, 2, 2))
    assert reason
    assert "\n" not in reason
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    torch.testing.assert_close(load_file(tmp_path / "model" / "model.safetensors"), dict(module.state_dict()))


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    export_images(tmp_path / "model", Undecided(), MEAN, STD, ["a", "b"], (3, 2, 2))
    assert export_images(tmp_path / "model", network(), MEAN, STD, ["x"] * 10, (3, 16, 16)) is None
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_example_is_an_image() -> None:
    images = example_images(2, (1, 8, 8))
    assert images.shape == (2, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("module", ["disttrain.tracking", "disttrain.tracking.mlflow.sender_process"])
def test_what_every_worker_imports_brings_neither_mlflow_nor_matplotlib_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print({{'mlflow', 'matplotlib', 'torch'}} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_what_the_first_export_imports_can_be_imported_beforehand() -> None:
    before = torch.get_rng_state()
    warm_up()
    assert "torch._dynamo" in sys.modules
    assert torch.equal(torch.get_rng_state(), before), "in the midst of a training"
