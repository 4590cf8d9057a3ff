"""Data sets as memory maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from disttrain.data import Datasets, MemorySplit
from disttrain.data.sources import cache as cache_module
from disttrain.data.sources.cache import cached
from disttrain.data.sources.synthetic import synthetic_images
from tests.disttrain.data.sources.cifar_files import batch, write_cifar

Load = Callable[..., Datasets]


def made() -> Datasets:
    return synthetic_images(num_train=20, num_test=5, num_classes=3)


def never() -> Datasets:
    raise AssertionError("made a second time")


def same(one: Datasets, other: Datasets) -> bool:
    return all(
        isinstance(a, MemorySplit)
        and isinstance(b, MemorySplit)
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.classes, a.mean, a.std) == (b.classes, b.mean, b.std)
        for a, b in ((one.train, other.train), (one.test, other.test))
    )


def test_it_is_made_once_and_mapped_from_then_on(tmp_path: Path) -> None:
    assert same(cached(tmp_path, "small", made), made())
    assert same(cached(tmp_path, "small", never), made())
    assert [entry.name for entry in (tmp_path / ".disttrain").iterdir()] == ["small.safetensors"]
    file = str(tmp_path / ".disttrain" / "small.safetensors")
    held = cached(tmp_path, "small", never)
    assert file in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else held


def test_writing_to_the_tensors_reaches_nobody_else(tmp_path: Path) -> None:
    first = cached(tmp_path, "small", made)
    assert isinstance(first.train, MemorySplit)
    first.train.images.zero_()
    assert same(cached(tmp_path, "small", never), made())


def test_a_changed_source_is_read_again(load: Load, tmp_path: Path) -> None:
    contents = write_cifar(tmp_path)
    before = load(dataset="cifar10", root=str(tmp_path), verify=False)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    pixels, labels = contents["test_batch"]
    status = file.stat()
    file.write_bytes(batch(pixels, [9 - label for label in labels]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    after = load(dataset="cifar10", root=str(tmp_path), verify=False)
    assert isinstance(before.test, MemorySplit)
    assert isinstance(after.test, MemorySplit)
    assert torch.equal(after.test.labels, 9 - before.test.labels)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_damaged_file_is_made_anew(size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(tmp_path, "small", made)
    file = tmp_path / ".disttrain" / "small.safetensors"
    os.truncate(file, size)
    assert same(cached(tmp_path, "small", made), made())
    assert f"{file} is damaged and is recreated" in caplog.text
    assert same(cached(tmp_path, "small", never), made())


def test_a_folder_that_cannot_be_written_to_has_its_cache_with_the_user(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / ".disttrain").write_text("a file in the folder's place refuses even the superuser")
    assert same(cached(root, "small", made), made())
    assert same(cached(root, "small", never), made())
    assert len(list((tmp_path / "user-cache").rglob("small.safetensors"))) == 1


def test_without_a_place_each_worker_holds_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".disttrain").touch()
    (tmp_path / "user-cache").touch()
    assert same(cached(tmp_path, "small", made), made())
    assert "each worker holds its own copy" in caplog.text


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    assert same(cached(tmp_path, "small", made), made())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_that_another_machine_published_meanwhile_stays(tmp_path: Path) -> None:
    file = tmp_path / ".disttrain" / "small.safetensors"

    def overtaken() -> Datasets:
        cached(tmp_path, "small", made)
        overtaken.number = file.stat().st_ino
        return made()

    assert same(cached(tmp_path, "small", overtaken), made())
    assert file.stat().st_ino == overtaken.number
    assert len(list(file.parent.iterdir())) == 1


def test_others_may_read_it_as_they_may_read_the_folder(tmp_path: Path) -> None:
    cached(tmp_path, "small", made)
    folder = tmp_path / ".disttrain"
    assert (folder / "small.safetensors").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
