"""Pictures in folders, one per class: the ImageFolder layout, root/{train,test|val}/<class>/*."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from disttrain.data.dataset import Datasets, MemorySplit, StreamSplit
from disttrain.data.digest import Digest, digest_of_files
from disttrain.data.sources.cache import cached, fingerprint
from disttrain.data.sources.picture import read_picture
from disttrain.distributed.cores import usable_cores
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from disttrain.recipe.address import expanded

_log = logging.getLogger(__name__)
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MEMORY_LIMIT = 2 * 1024**3
"""Bytes of all images together, up to which `data.layout = "auto"` holds them in memory."""
_DECODING = "folder 2"  # what is kept of pictures that were decoded in another way is not used
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

    @property
    def targets(self) -> list[int]:
        """All labels."""
        return [label for _, label in self.files]

    def training_digest(self) -> Digest:
        """See `disttrain.data.digest`."""
        return digest_of_files(self.files)


def load_folder(data: DataRecipe) -> Datasets:
    """The pictures under `data.root`, in memory or as a stream, by `data.layout`.

    The test split is the folder `test`, or `val`. Raises ConfigurationError for a missing split, classes that differ
    between the two, and pictures that cannot be read or differ in size.
    """
    root = expanded(data.root)
    if not root.is_dir():
        raise ConfigurationError(
            f"data.root: the folder {root.absolute()} does not exist; it should hold train/ and test/ (or val/)."
        )
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
    return cached(root, f"folder-{fingerprint([_DECODING, str(data.image_size)], paths, root)}", build)


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
    """The classes and the pictures of a split, in the order of torchvision's ImageFolder.

    What is hidden (.ipynb_checkpoints, macOS's ._1.jpg) is left out, and so are links to a folder of the split itself,
    whose pictures would count twice.
    """
    split = os.path.realpath(folder)
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    names = [name for name in names if not _leads_back(folder / name, split, ())]
    if not names:
        raise ConfigurationError(f"data.root: {folder} holds no folders; make one for each class.")
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(names):
        found = sorted(_pictures(folder / name, split, (os.path.realpath(folder / name),)))
        if not found:
            raise ConfigurationError(
                f"data.root: no pictures in {folder / name} (looked for {', '.join(IMG_EXTENSIONS)}); add some or "
                "remove the folder."
            )
        files += [(Path(place, file), label) for place, file in found]
    return tuple(map(_as_text, names)), tuple(files)


def _pictures(folder: Path, split: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(folder, name) of the pictures in and below `folder`, which was reached through the real folders `above`."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            if entry.name.lower().endswith(IMG_EXTENSIONS):
                yield str(folder), entry.name
            continue
        if not _leads_back(Path(entry.path), split, above):
            yield from _pictures(Path(entry.path), split, (*above, os.path.realpath(entry.path)))


def _leads_back(folder: Path, split: str, above: tuple[str, ...]) -> bool:
    """Whether `folder` is a link to where the walk comes through anyway: into the split, or to a folder `above`."""
    if not folder.is_symlink():
        return False
    real = os.path.realpath(folder)
    back = any(_is_within(one, real) for one in (split, *above)) or (bool(above) and _is_within(real, split))
    if back:
        _log.warning("%s is a link to %s, whose pictures are already counted; it is skipped.", folder, real)
    return back


def _is_within(path: str, folder: str) -> bool:
    """Whether a real path is `folder` or in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _as_text(name: str) -> str:
    """A folder's name as a class is called: bytes that are not UTF-8 as \\xNN, which every file and terminal takes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
