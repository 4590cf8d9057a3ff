"""Data files that something has changed: each is refused by name, or gives a data set that can be trained on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from disttrain.data.dataset import Datasets, MemorySplit
from disttrain.data.sources.cifar import load_cifar
from disttrain.data.sources.folder import load_folder
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from tests.disttrain.data.sources.cifar_files import write_cifar
from tests.disttrain.mutations import mutated_bytes, mutated_safetensors


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CIFAR-10 under `cifar`, small pictures under `pictures`, both with their converted sets."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root / "cifar")
    chance = random.Random(0)
    for which in ("train", "test"):
        for number, kind in enumerate(("cat.png", "dog.jpg")):
            folder = root / "pictures" / which / kind.partition(".")[0]
            folder.mkdir(parents=True)
            Image.frombytes("RGB", (8, 8), chance.randbytes(192)).save(folder / f"{number}{Path(kind).suffix}")
    for kind in ("cifar", "pictures"):
        load(root, kind)
    return root


def load(root: Path, kind: str) -> Datasets:
    if kind == "cifar":
        return load_cifar(DataRecipe(dataset="cifar10", root=str(root / kind), verify=False, download=False), CIFAR10)
    return load_folder(DataRecipe(dataset="folder", root=str(root / kind)))


def check(found: Datasets) -> None:
    for split in (found.train, found.test):
        assert isinstance(split, MemorySplit)
        assert split.images.dtype == torch.uint8
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(split.classes)


def equal(one: Datasets, other: Datasets) -> bool:
    pairs = [(one.train, other.train), (one.test, other.test)]
    return all(
        isinstance(a, MemorySplit)
        and isinstance(b, MemorySplit)
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.classes, a.mean, a.std) == (b.classes, b.mean, b.std)
        for a, b in pairs
    )


def try_sources(seeds: range, good: Path, folder: Path) -> None:
    """Change one file of the publisher, or one picture."""
    for seed in seeds:
        chance = random.Random(seed)
        kind = chance.choice(["cifar", "pictures"])
        copy = folder / f"data-{seed}"
        shutil.copytree(good / kind, copy / kind, ignore=shutil.ignore_patterns(".disttrain"))
        path = chance.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        path.write_bytes(mutated_bytes(path.read_bytes(), chance))
        try:
            check(load(copy, kind))
        except ConfigurationError as error:
            # Of two files that do not fit together either may be the changed one.
            assert str(copy) in str(error) or "label" in str(error), error
            assert len(str(error)) < 1000
        except Exception as error:
            raise AssertionError(f"seed {seed}: {path.name}: {type(error).__name__}: {error}") from error
        shutil.rmtree(copy)


def try_converted(seeds: range, good: Path, folder: Path) -> None:
    """Change the converted set: it is made anew, and nothing of the change is ever seen."""
    for seed in seeds:
        chance = random.Random(seed)
        kind = chance.choice(["cifar", "pictures"])
        copy = folder / f"converted-{seed}"
        shutil.copytree(good / kind, copy / kind)
        (path,) = (copy / kind / ".disttrain").iterdir()
        change = chance.choice([mutated_bytes, mutated_safetensors])
        path.write_bytes(change(path.read_bytes(), chance))
        try:
            assert equal(load(copy, kind), load(good, kind))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(copy)


def test_mutated_sources(good: Path, tmp_path: Path) -> None:
    try_sources(range(200), good, tmp_path)


def test_mutated_converted_sets(good: Path, tmp_path: Path) -> None:
    try_converted(range(100), good, tmp_path)


def test_a_bit_in_what_the_converted_set_says_of_itself(good: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(good / "cifar", copy / "cifar")
    (path,) = (copy / "cifar/.disttrain").iterdir()
    raw = path.read_bytes()
    assert raw.count(b"0.4914") == 1
    path.write_bytes(raw.replace(b"0.4914", b"0.4915"))
    assert equal(load(copy, "cifar"), load(good, "cifar"))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_mutated_data_files(good: Path, tmp_path: Path) -> None:
    try_sources(range(1000, 3000), good, tmp_path)
    try_converted(range(1000, 2000), good, tmp_path)
