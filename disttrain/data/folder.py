"""Pictures in folders, one per class: the ImageFolder layout, root/{train,test|val}/<class>/*."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from disttrain.cores import usable_cores
from disttrain.data.cache import cached, fingerprint
from disttrain.data.dataset import Datasets, MemorySplit, StreamSplit
from disttrain.data.picture import read_picture
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of all images together, up to which `data.layout = "auto"` holds them in memory."""
# ImageNet's, which most torchvision recipes use.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PictureFiles:
    """A map-style data set of (picture (3, H, W) uint8, label), read from files of one size, or brought to `size`."""

    files: tuple[tuple[Path, int], ...]
    size: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        return read_picture(path, self.size), label


def load_folder(data: DataRecipe) -> Datasets:
    """The pictures under `data.root`, in memory or as a stream, by `data.layout`.

    The test split is the folder `test`, or `val`. Raises ConfigurationError for a missing split, classes that differ
    between the two, and pictures that cannot be read or differ in size.
    """
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise ConfigurationError(f"data.root: the folder {root} does not exist.")
    train_folder = _split_folder(root, "train")
    test_folder = _split_folder(root, "test", "val")
    classes, train_files = _find(train_folder)
    test_classes, test_files = _find(test_folder)
    _check_same_classes(train_folder, classes, test_folder, test_classes)

    size = None if data.image_size is None else (data.image_size, data.image_size)
    _, height, width = read_picture(train_files[0][0], size).shape
    if data.layout == "auto":
        in_memory = (len(train_files) + len(test_files)) * 3 * height * width <= MEMORY_LIMIT
    else:
        in_memory = data.layout == "memory"
    if not in_memory:
        return Datasets(
            *(
                StreamSplit(PictureFiles(files, (height, width) if size else None), classes, _MEAN, _STD)
                for files in (train_files, test_files)
            )
        )

    def build() -> Datasets:
        return Datasets(
            *(_in_memory(PictureFiles(files, size), classes, (height, width)) for files in (train_files, test_files))
        )

    paths = [path for path, _ in (*train_files, *test_files)]
    return cached(root, f"folder-{fingerprint(['folder', str(data.image_size)], paths, root)}", build)


def _split_folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    here = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:5]) or "no folders"
    raise ConfigurationError(
        f"data.root: {root} has no folder {' or '.join(map(repr, names))} (it has {here}); "
        "the layout is train/<class>/* and test/<class>/* (or val/)."
    )


def _find(folder: Path) -> tuple[tuple[str, ...], tuple[tuple[Path, int], ...]]:
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not classes:
            raise ConfigurationError(f"data.root: {folder} holds no folders; make one for each class.") from error
        empty = [name for name in classes if not _has_pictures(folder / name)]
        raise ConfigurationError(
            f"data.root: no pictures in {folder / empty[0] if empty else folder} "
            f"(looked for {', '.join(IMG_EXTENSIONS)}); add some or remove the folder."
        ) from error
    return tuple(found.classes), tuple((Path(path), label) for path, label in found.samples)


def _has_pictures(folder: Path) -> bool:
    return any(file.lower().endswith(IMG_EXTENSIONS) for _, _, files in os.walk(folder) for file in files)


def _check_same_classes(train: Path, classes: tuple[str, ...], test: Path, test_classes: tuple[str, ...]) -> None:
    for here, there, names in (
        (train, test, set(classes) - set(test_classes)),
        (test, train, set(test_classes) - set(classes)),
    ):
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise ConfigurationError(f"data.root: {here} has classes that {there} lacks: {listed}; both need the same.")


def _in_memory(pictures: PictureFiles, classes: tuple[str, ...], size: tuple[int, int]) -> MemorySplit:
    images = torch.empty((len(pictures), 3, *size), dtype=torch.uint8)

    def place(index: int) -> None:
        picture, _ = pictures[index]
        if tuple(picture.shape[1:]) != size:
            raise ConfigurationError(
                f"{pictures.files[index][0]} is {picture.shape[2]} x {picture.shape[1]} pixels and the first picture "
                f"{size[1]} x {size[0]}; set data.image_size to bring all to one size."
            )
        images[index] = picture

    # Pillow decodes outside the interpreter's lock, and the other workers of the machine are waiting.
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(place, range(len(pictures))):
            pass
    labels = torch.tensor([label for _, label in pictures.files])
    return MemorySplit(images, labels, classes, _MEAN, _STD)
