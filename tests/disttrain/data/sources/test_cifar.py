"""CIFAR-10 and CIFAR-100 from disk: what is read, what is refused, and what the message says."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from disttrain.data import Datasets, MemorySplit
from disttrain.data.sources.cifar import load_cifar
from disttrain.errors import ConfigurationError, ExitCode
from disttrain.recipe import DataRecipe
from tests.disttrain.data.sources.cifar_files import CLASSES, ROWS, batch, published, write_archive, write_cifar

Load = Callable[..., Datasets]


def refusal(load: Load, root: Path, **keys: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(dataset="cifar10", root=str(root), **{"verify": False, "download": False, **keys})
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_an_altered_copy_is_read_in_the_order_of_its_files(load: Load, tmp_path: Path) -> None:
    contents = write_cifar(tmp_path)
    data = load(dataset="cifar10", root=str(tmp_path), verify=False)
    assert isinstance(data.train, MemorySplit)
    assert isinstance(data.test, MemorySplit)
    pixels = np.concatenate([contents[f"data_batch_{number}"][0] for number in range(1, 6)])
    labels = [label for number in range(1, 6) for label in contents[f"data_batch_{number}"][1]]
    assert np.array_equal(data.train.images.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert data.train.labels.tolist() == labels
    assert data.test.labels.tolist() == contents["test_batch"][1]
    assert data.train.classes == tuple(CLASSES)
    assert (data.train.sample_shape, len(data.test)) == ((3, 32, 32), ROWS)
    assert data.train.mean == (0.4914, 0.4822, 0.4465)


def test_cifar100_has_its_fine_labels(load: Load, tmp_path: Path) -> None:
    contents = write_cifar(tmp_path, CIFAR100)
    data = load(dataset="cifar100", root=str(tmp_path), verify=False)
    assert isinstance(data.train, MemorySplit)
    assert data.train.labels.tolist() == contents["train"][1]
    assert len(data.test.classes) == 100


def test_the_recipes_statistics_take_the_place_of_the_sets_own(load: Load, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    data = load(dataset="cifar10", root=str(tmp_path), verify=False, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    assert (data.test.mean, data.test.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert "data.mean and data.std: 1 and 1 numbers for images of 3 channels" in refusal(
        load, tmp_path, mean=[0.5], std=[0.5]
    )


def test_an_altered_copy_is_not_taken_for_the_published_one(load: Load, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    for _ in range(2):  # not even once it has been read with verify=false, into the cache
        assert refusal(load, tmp_path, verify=True).startswith(
            f"data.verify: {file} does not have the published md5 sum. Set data.verify=false to accept an altered copy"
        )
        load(dataset="cifar10", root=str(tmp_path), verify=False)


def test_nothing_there_and_no_download(load: Load, tmp_path: Path) -> None:
    assert refusal(load, tmp_path / "nowhere") == (
        f"data.root: there is no cifar-10-batches-py in {tmp_path / 'nowhere'}; point data.root to its parent folder, "
        "or set data.download=true."
    )
    assert not (tmp_path / "nowhere").exists()


def test_one_folder_too_deep(load: Load, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    message = refusal(load, tmp_path / "cifar-10-batches-py", download=True)
    assert "holds the batches themselves; give the folder above it" in message


def test_offline(tmp_path: Path) -> None:
    class Nowhere(CIFAR10):
        url = "http://127.0.0.1:9/cifar-10-python.tar.gz"

    with pytest.raises(ConfigurationError) as caught:
        load_cifar(DataRecipe(dataset="cifar10", root=str(tmp_path / "data")), Nowhere)
    message = str(caught.value)
    assert message.startswith(f"data.root: there is no cifar-10-batches-py in {tmp_path / 'data'}, and downloading")
    assert "Connection refused" in message
    assert f"Put cifar-10-python.tar.gz into {tmp_path / 'data'} yourself" in message
    assert list((tmp_path / "data").iterdir()) == []


def test_an_archive_that_is_there_is_unpacked_without_a_download(tmp_path: Path) -> None:
    origin, root = tmp_path / "origin", tmp_path / "root"
    contents = write_cifar(origin)
    root.mkdir()
    archive = root / "cifar-10-python.tar.gz"
    write_archive(origin / "cifar-10-batches-py", archive)
    facts = published(origin / "cifar-10-batches-py", archive, "http://127.0.0.1:9/")
    data = load_cifar(DataRecipe(dataset="cifar10", root=str(root), download=False), type("Small", (CIFAR10,), facts))
    assert data.test.labels.tolist() == contents["test_batch"][1]
    assert sorted(entry.name for entry in root.iterdir()) == [".disttrain", "cifar-10-batches-py", archive.name]


def test_an_altered_archive_is_neither_unpacked_nor_overwritten(load: Load, tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"mine")
    assert f"{archive} does not have the published md5 sum" in refusal(load, tmp_path, download=True)
    assert archive.read_bytes() == b"mine"


def _without(folder: Path) -> None:
    (folder / "data_batch_3").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:1000])


def _of_grey(folder: Path) -> None:
    (folder / "data_batch_3").write_bytes(batch(np.zeros((2, 1024), dtype=np.uint8), [1, 2]))


def _mislabelled(folder: Path) -> None:
    (folder / "data_batch_3").write_bytes(batch(np.zeros((2, 3072), dtype=np.uint8), [1, 10]))


def _short_of_labels(folder: Path) -> None:
    (folder / "data_batch_3").write_bytes(batch(np.zeros((2, 3072), dtype=np.uint8), [1]))


def _a_list(folder: Path) -> None:
    (folder / "data_batch_3").write_bytes(pickle.dumps([1, 2]))


def _nameless(folder: Path) -> None:
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "is incomplete, data_batch_3 is missing"),
        (_truncated, "data_batch_3: not a readable pickle"),
        (_of_grey, "data_batch_3: 'data' is not a matrix of 3072 bytes a row"),
        (_mislabelled, "data_batch_3: the labels are not numbers from 0 to 9"),
        (_short_of_labels, "data_batch_3: 2 images and 1 labels"),
        (_a_list, "data_batch_3: holds a list where a dictionary belongs"),
        (_nameless, "batches.meta: 'label_names' is not a list of class names"),
    ],
)
def test_a_damaged_file_is_named(damage: Callable[[Path], None], message: str, load: Load, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    damage(tmp_path / "cifar-10-batches-py")
    assert message in refusal(load, tmp_path)


def test_a_malicious_batch_runs_nothing(load: Load, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    mark = tmp_path / "was-here"
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(b"\x80\x02cposix\nsystem\nX" + len(f"touch {mark}").to_bytes(4, "little"))
    file.write_bytes(file.read_bytes() + f"touch {mark}".encode() + b"\x85R.")
    assert f"{file}: refused: the file asks for posix.system" in refusal(load, tmp_path)
    assert not mark.exists()


@pytest.mark.skipif(
    "DISTTRAIN_TEST_CIFAR10" not in os.environ, reason="DISTTRAIN_TEST_CIFAR10 names no CIFAR-10 folder"
)
def test_the_real_set(load: Load, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").symlink_to(Path(os.environ["DISTTRAIN_TEST_CIFAR10"]) / "cifar-10-batches-py")
    data = load(dataset="cifar10", root=str(tmp_path), verify=False)
    assert isinstance(data.train, MemorySplit)
    assert isinstance(data.test, MemorySplit)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert torch.equal(data.train.labels.bincount(), torch.full((10,), 5000))
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 1000))
    pixels = data.train.images[::10].float() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.train.mean), atol=0.005)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(data.train.std), atol=0.005)
