"""What the trained model is given later is what it was given in training: for every kind of data set, the evaluation,
`predict` and the exported model that MLflow serves say the same of the same samples, or `predict` refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import disttrain
from disttrain.commands import evaluate, predict
from disttrain.commands.locate import data_of, find_checkpoint, recipe_of, restore_model
from disttrain.data import Datasets, MemorySplit, as_datasets, load_datasets
from disttrain.errors import ConfigurationError
from disttrain.recipe import Recipe, load_recipe
from disttrain.tracking import Tracker
from disttrain.tracking.export import export_model
from tests.disttrain.data.conftest import ALONE
from tests.disttrain.data.loaders import eval_loader, image_task
from tests.disttrain.data.sources.cifar_files import write_cifar

QUIET = ["tracking.uri=none", "tracking.system_metrics=false", "train.threads=1", "train.max_steps=2"]
NORMALISED = ["data.mean=[0.3, 0.4, 0.5]", "data.std=[0.1, 0.2, 0.3]"]
CLASSES = ("a", "b", "c")


def images(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(num, 3, 16, 16) uint8, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    return torch.randint(0, 256, (num, 3, 16, 16), generator=generator).to(torch.uint8), labels


def as_usual(image: Any) -> torch.Tensor:
    """torchvision's ToTensor and Normalize, as most data sets of one's own have them."""
    from torchvision.transforms import v2

    scaled = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
    return v2.functional.normalize(scaled, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


class Own:
    """A map-style data set that makes something of each image, (3, 16, 16) uint8."""

    classes = CLASSES

    def __init__(self, num: int, seed: int, make: Callable[[torch.Tensor], Any]) -> None:
        self.images, self.labels = images(num, seed)
        self.make = make

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.make(self.images[index]), int(self.labels[index])


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def write_folder(root: Path) -> None:
    for split, num, seed in (("train", 12, 0), ("test", 6, 1)):
        for index, (image, label) in enumerate(zip(*images(num, seed), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture(image).resize((20, 24)).save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")


def own(make: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {"train_set": Own(12, 0, make), "test_set": Own(6, 1, make)}


def pairs(make: Callable[[torch.Tensor, torch.Tensor], Any]) -> dict[str, Any]:
    return {"train_set": make(*images(12, 0)), "test_set": make(*images(6, 1))}


def floats_of_a_callable() -> tuple[Own, Own]:
    sets = own(lambda image: as_usual(picture(image)))
    return sets["train_set"], sets["test_set"]


@dataclass(frozen=True)
class Kind:
    """A kind of data set: keys of the recipe, objects in place of what it names, and whether its samples are bytes."""

    keys: list[str] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    bytes_: bool = True


KINDS = {
    "digits": Kind(["data.dataset=digits"]),
    "cifar10": Kind(["data.dataset=cifar10", "data.root=.", "data.verify=false", "data.download=false"]),
    "synthetic": Kind(["data.dataset=synthetic", "data.options.num_train=40", "data.options.num_test=9"]),
    "folder": Kind(["data.dataset=folder", "data.root=.", "data.image_size=16"]),
    "folder, streamed": Kind(["data.dataset=folder", "data.root=.", "data.image_size=16", "data.layout=stream"]),
    "folder, another mean": Kind(["data.dataset=folder", "data.root=.", "data.image_size=16", *NORMALISED]),
    "tensors": Kind(objects=pairs(lambda one, labels: (one, labels))),
    "tensors, another mean": Kind(NORMALISED, pairs(lambda one, labels: (one, labels))),
    "arrays (N, H, W, C)": Kind(objects=pairs(lambda one, labels: (one.permute(0, 2, 3, 1).numpy(), labels.numpy()))),
    "TensorDataset": Kind(objects=pairs(TensorDataset)),
    "own set of tensors": Kind(objects=own(lambda image: image)),
    "own set of pictures": Kind(NORMALISED, own(picture)),
    "own set of arrays": Kind(objects=own(lambda image: image.permute(1, 2, 0).numpy())),
    "float tensors": Kind(objects=pairs(lambda one, labels: (one / 51 - 2, labels)), bytes_=False),
    "float arrays": Kind(objects=pairs(lambda one, labels: (one.double().numpy() / 51, labels.numpy())), bytes_=False),
    "own set, ToTensor and Normalize": Kind(objects=own(lambda one: as_usual(picture(one))), bytes_=False),
    "the same, a mean in the recipe": Kind(NORMALISED, own(lambda one: as_usual(picture(one))), bytes_=False),
    "callable": Kind([f"data.dataset={__name__}:floats_of_a_callable"], bytes_=False),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_evaluation_prediction_and_the_model_for_mlflow_agree(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "data.dataset=folder" in kind.keys:
        write_folder(tmp_path)
    if "data.dataset=cifar10" in kind.keys:
        write_cifar(tmp_path)
    monkeypatch.setattr(Tracker, "exports_models", True)
    monkeypatch.setattr(Tracker, "model", lambda _, *arguments: export_model(tmp_path / "model", *arguments))
    recipe = load_recipe("digits", [*QUIET, "data.batch_size=6", "data.workers=0", "data.crop_padding=0", *kind.keys])
    result = disttrain.train(recipe, run_dir=tmp_path / "run", **kind.objects)
    capsys.readouterr()

    split = datasets(recipe, kind.objects).test
    checkpoint = find_checkpoint(tmp_path / "run")
    task = image_task(split, recipe.data)
    model = restore_model(checkpoint, recipe_of(checkpoint, trust=True), task, split).eval()
    loader = eval_loader(split, recipe.data, batch_size=recipe.train.eval_batch_size)
    with torch.no_grad():
        evaluated = torch.cat([model(batch.data[0]).softmax(1) for batch in loader])
        hits = torch.cat([batch.data[1] for batch in loader]) == evaluated.argmax(1)
    assert result.accuracy == pytest.approx(hits.double().mean().item())

    served = torch.export.load(tmp_path / "model" / "model.pt2").module()
    samples = [split.images[index] if isinstance(split, MemorySplit) else split.dataset[index][0] for index in range(6)]
    torch.testing.assert_close(served(torch.stack(samples).float()), evaluated[:6], rtol=1e-4, atol=1e-5)

    if not kind.bytes_:
        with pytest.raises(ConfigurationError, match="trained on floats that its data set made"):
            predicted(tmp_path / "run", [write(picture(samples[0].to(torch.uint8)), tmp_path / "one.png")], capsys)
        return
    if kind.keys[:1] == ["data.dataset=folder"]:
        files = sorted((tmp_path / "test").glob("*/*"))
    else:
        files = [write(picture(sample), tmp_path / f"{index}.png") for index, sample in enumerate(samples)]
    theirs = predicted(tmp_path / "run", files, capsys)
    assert data_of(checkpoint)["classes"] == list(split.classes)
    torch.testing.assert_close(theirs, evaluated[:6, : theirs.shape[1]], rtol=1e-4, atol=1e-5)


def datasets(recipe: Recipe, objects: dict[str, Any]) -> Datasets:
    from contextlib import nullcontext

    if objects:
        return as_datasets(objects["train_set"], objects["test_set"], recipe.data)
    return load_datasets(recipe.data, ALONE, nullcontext)


def write(one: Image.Image, path: Path) -> Path:
    one.save(path)
    return path


def predicted(run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> torch.Tensor:
    """What `disttrain predict` says of each file, (N, num_classes), in the order of the classes."""
    predict.command.main([str(run), *map(str, files), "--top", "1000", "--json"], standalone_mode=False)
    answer = json.loads(capsys.readouterr().out)
    classes = data_of(find_checkpoint(run))["classes"]
    rows = [{guess["class"]: guess["probability"] for guess in one["classes"]} for one in answer["predictions"]]
    return torch.tensor([[row[name] for name in classes] for row in rows])


def test_predict_of_other_than_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of four channels are refused, and an older checkpoint that may be of floats is warned of."""
    four = torch.cat([images(6, 0)[0]] * 2, dim=1)[:, :4]
    recipe = load_recipe("digits", [*QUIET, "data.batch_size=6", "data.crop_padding=0"])
    disttrain.train(
        recipe, run_dir=tmp_path / "four", train_set=(four, images(6, 0)[1]), test_set=(four, images(6, 0)[1])
    )
    file = write(picture(images(1, 0)[0][0]), tmp_path / "one.png")
    with pytest.raises(ConfigurationError, match="trained on images of 4 channels, and pictures are read in 3"):
        predicted(tmp_path / "four", [file], capsys)
    disttrain.train(recipe, run_dir=tmp_path / "old", train_set=images(6, 0), test_set=images(6, 1))
    checkpoint = find_checkpoint(tmp_path / "old")
    del checkpoint.state["data"]["dtype"]
    monkeypatch.setattr("disttrain.commands.locate.find_checkpoint", lambda _, raw: checkpoint)
    predict.command.main([str(tmp_path / "old"), str(file)], standalone_mode=False)
    assert "did not record whether the data set gave bytes or floats" in capsys.readouterr().err


def test_a_model_without_a_length_to_speak_of_is_still_the_model(tmp_path: Path) -> None:
    class Empty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = torch.nn.Linear(3 * 16 * 16, 3)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.only(batch.flatten(1))
            return scores

        def __len__(self) -> int:
            return 0

    recipe = load_recipe("digits", [*QUIET, "data.batch_size=6", "data.crop_padding=0"])
    disttrain.train(recipe, run_dir=tmp_path, model=Empty(), train_set=images(6, 0), test_set=images(6, 1))
    assert find_checkpoint(tmp_path).model.keys() == {"only.weight", "only.bias"}


def test_samples_that_are_prepared_otherwise_now_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A callable that gives floats now, or another mean, is not what the run was trained on."""
    reference = f"{__name__}:changing"
    recipe = load_recipe("digits", [*QUIET, "data.batch_size=6", "data.crop_padding=0", f"data.dataset={reference}"])
    monkeypatch.setattr(f"{__name__}.MEAN", 0.5)
    disttrain.train(recipe, run_dir=tmp_path)
    command = [str(tmp_path), "--trust", "--json"]
    evaluate.command.main(command, standalone_mode=False)
    as_trained = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    monkeypatch.setattr(f"{__name__}.MEAN", 0.25)
    for attempt in (
        lambda: evaluate.command.main(command, standalone_mode=False),
        lambda: disttrain.train(recipe, run_dir=tmp_path),
    ):
        with pytest.raises(ConfigurationError, match=r"trained on samples with mean = \[0.5, .*\], and .* \[0.25, "):
            attempt()
    evaluate.command.main(
        [*command, "-o", "data.mean=[0.1,0.1,0.1]", "-o", "data.std=[0.5,0.5,0.5]"], standalone_mode=False
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] != as_trained, "as the override has it"


MEAN = 0.5


def changing() -> Datasets:
    train, test = (MemorySplit(*images(num, 0), CLASSES, (MEAN,) * 3, (0.5,) * 3) for num in (12, 6))
    return Datasets(train, test)
