"""The ImageFolder layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from disttrain.data import Datasets, MemorySplit, StepSampler, StreamSplit, read_picture
from disttrain.data.sources import folder as folder_module
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from tests.disttrain.data.loaders import eval_loader, train_loader

Load = Callable[..., Datasets]


def picture(path: Path, size: tuple[int, int] = (12, 10), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of PNGs, 12 x 10 pixels: five in train, three in test."""
    root = tmp_path / "pictures"
    for split, number in (("train", 5), ("test", 3)):
        for index in range(number):
            picture(root / split / ("cat" if index % 2 else "bird") / f"{index}.png", seed=index)
    return root


def refusal(load: Load, root: Path, **keys: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(dataset="folder", root=str(root), **keys)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_pictures_and_labels_come_from_the_folders(load: Load, root: Path) -> None:
    data = load(dataset="folder", root=str(root))
    assert isinstance(data.train, MemorySplit)
    assert data.train.classes == ("bird", "cat")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.train.sample_shape == (3, 10, 12)
    with Image.open(root / "train" / "bird" / "2.png") as opened:
        assert np.array_equal(data.train.images[1].permute(1, 2, 0).numpy(), np.asarray(opened))


@pytest.mark.parametrize("layout", ["memory", "stream"])
def test_links_multiply_no_pictures_and_what_is_hidden_is_no_class(
    layout: str, load: Load, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load(dataset="folder", root=str(root))
    picture(root / "train" / ".ipynb_checkpoints" / "0-checkpoint.png")
    picture(root / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (root / "train" / "cat" / "._1.png").write_bytes(b"what macOS leaves")
    (root / "train" / "cat" / "up").symlink_to("..")
    (root / "train" / "cat" / "self").symlink_to(".")
    (root / "train" / "bird" / "other").symlink_to(root / "train" / "cat")
    (root / "train" / "all").symlink_to(root / "train")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "again").symlink_to(elsewhere)
    (root / "train" / "cat" / "elsewhere").symlink_to(elsewhere)
    data = load(dataset="folder", root=str(root), layout=layout)
    assert data.train.classes == before.train.classes == ("bird", "cat")
    assert len(data.train) == len(before.train) == 5
    assert (
        f"{root / 'train' / 'cat' / 'up'} is a link to {root / 'train'}, whose pictures are already counted"
        in caplog.text
    )
    picture(elsewhere / "further.png", seed=9)  # pictures that are nowhere else may be linked
    assert len(load(dataset="folder", root=str(root), layout=layout).train) == 6


def test_names_need_not_be_utf8_nor_plain(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 #1%20?[x]"))
    for split in ("train", "test"):
        for name in (b"caf\xe9", "naïve &;".encode()):
            picture(root / split / os.fsdecode(name) / os.fsdecode(b"\xff\n'\"$.png"))
    for layout in ("memory", "memory", "stream"):  # the second time from what was converted
        data = load(dataset="folder", root=str(root), layout=layout)
        assert data.train.classes == (r"caf\xe9", "naïve &;")
        assert len(list(eval_loader(data.test, DataRecipe(workers=1), batch_size=1))) == 2
    assert "could not be cached" not in caplog.text
    next((root / "test").glob("*/*")).write_bytes(b"")
    with pytest.raises(ConfigurationError, match="cannot be read as a picture"):
        load(dataset="folder", root=str(root))


def test_neither_a_home_nor_a_name_is_needed(load: Load, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(load(dataset="folder", root=str(root)).train) == 5


def test_the_test_split_may_be_called_val(load: Load, root: Path) -> None:
    (root / "test").rename(root / "val")
    assert len(load(dataset="folder", root=str(root)).test) == 3


def test_image_size_resizes_the_shorter_side_and_crops_the_middle(load: Load, root: Path) -> None:
    picture(root / "train" / "cat" / "tall.jpg", size=(9, 30))
    picture(root / "train" / "cat" / "grey.png", size=(40, 40), mode="L")
    data = load(dataset="folder", root=str(root), image_size=8)
    assert data.train.sample_shape == (3, 8, 8)
    square = root / "square.png"
    halves = np.zeros((20, 40, 3), dtype=np.uint8)
    halves[:, 10:30] = 255  # the middle square is white
    Image.fromarray(halves).save(square)
    assert read_picture(square, (20, 20)).min() == 255
    assert read_picture(square, (10, 10))[:, :, 1:-1].min() == 255
    assert read_picture(square, (20, 20), channels=1).shape == (1, 20, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_batches_of_memory(workers: int, load: Load, root: Path) -> None:
    keys: dict[str, Any] = {"dataset": "folder", "root": str(root), "image_size": 8, "workers": workers}
    keys |= {"crop_padding": 1, "flip": True, "cutout": 2, "batch_size": 2}
    memory, stream = load(**keys), load(layout="stream", **keys)
    assert isinstance(stream.train, StreamSplit)
    assert stream.train.sample_shape == (3, 8, 8)
    trained, evaluated = [], []
    for data in (memory, stream):
        sampler = StepSampler(len(data.train), batch_size=2)
        steps = train_loader(data.train, sampler, DataRecipe(**keys)).epoch(0)
        trained.append(torch.cat([step.parts[0].data[0] for step in steps]))
        evaluated.append(
            torch.cat([batch.data[0] for batch in eval_loader(data.test, DataRecipe(**keys), batch_size=2)])
        )
    assert torch.equal(*trained)
    assert torch.equal(*evaluated)


def test_auto_streams_what_is_large(load: Load, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MEMORY_LIMIT", 8 * 3 * 10 * 12)
    assert isinstance(load(dataset="folder", root=str(root)).train, MemorySplit)
    monkeypatch.setattr(folder_module, "MEMORY_LIMIT", 8 * 3 * 10 * 12 - 1)
    assert isinstance(load(dataset="folder", root=str(root)).train, StreamSplit)
    assert isinstance(load(dataset="folder", root=str(root), layout="memory").train, MemorySplit)


def test_missing_folders(load: Load, root: Path) -> None:
    assert refusal(load, root / "nowhere") == (
        f"data.root: the folder {root / 'nowhere'} does not exist; it should hold train/ and test/ (or val/)."
    )
    assert "has no folder 'train' (it has no folders)" in refusal(load, root / "train" / "cat")
    shutil.rmtree(root / "test")
    assert f"{root} has no folder 'test' or 'val' (it has train)" in refusal(load, root)


def test_classes_must_be_the_same(load: Load, root: Path) -> None:
    picture(root / "train" / "frog" / "0.png")
    message = f"data.root: {root / 'train'} has classes that {root / 'test'} lacks: frog; both need the same."
    assert refusal(load, root) == message


def test_a_class_without_pictures(load: Load, root: Path) -> None:
    (root / "train" / "frog").mkdir()
    (root / "train" / "frog" / "notes.txt").touch()
    assert f"no pictures in {root / 'train' / 'frog'}" in refusal(load, root)
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    assert f"{root / 'train'} holds no folders; make one for each class" in refusal(load, root)


@pytest.mark.parametrize("layout", ["memory", "stream"])
@pytest.mark.parametrize("cut", [0, 20, 200])
def test_an_unreadable_picture_is_named(layout: str, cut: int, load: Load, root: Path) -> None:
    file = root / "test" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:cut])
    data = DataRecipe(dataset="folder", root=str(root), layout=layout, workers=1)
    with pytest.raises(ConfigurationError) as caught:
        list(eval_loader(load(**data.model_dump()).test, data, batch_size=2))
    assert str(caught.value).startswith(f"{file}: cannot be read as a picture (")
    assert str(caught.value).endswith("); replace or remove it.")


def test_pictures_of_two_sizes_need_image_size(load: Load, root: Path) -> None:
    picture(root / "test" / "cat" / "1.png", size=(13, 10))
    message = refusal(load, root)
    assert message.startswith(f"{root / 'test' / 'cat' / '1.png'} is 13 x 10 pixels and the first picture 12 x 10")
    assert "set data.image_size" in message
