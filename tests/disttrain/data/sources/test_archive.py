"""Archives that want out of their folder."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import CIFAR10

from disttrain.data.sources.archive import unpack
from disttrain.data.sources.cifar import load_cifar
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from tests.disttrain.data.sources.cifar_files import ROWS, published, write_archive, write_cifar


def archive(path: Path, *members: tuple[str, bytes, str]) -> Path:
    """An archive of entries (name, type, content or target of a link)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o4777
            if kind == tarfile.REGTYPE:
                member.size = len(content)
            else:
                member.linkname = content
            tar.addfile(member, io.BytesIO(content.encode()) if kind == tarfile.REGTYPE else None)
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("../out", tarfile.REGTYPE, "owned")],
        [("a/../../out", tarfile.REGTYPE, "owned")],
        [("{outside}/out", tarfile.REGTYPE, "owned")],
        [("link", tarfile.SYMTYPE, ".."), ("link/out", tarfile.REGTYPE, "owned")],
        [("link", tarfile.SYMTYPE, "{outside}"), ("link/out", tarfile.REGTYPE, "owned")],
        [("link", tarfile.LNKTYPE, "{outside}/secret")],
        [("pipe", tarfile.FIFOTYPE, "")],
    ],
)
def test_hostile_entries(tmp_path: Path, members: list[tuple[str, bytes, str]]) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "outside/folder"
    folder.mkdir(parents=True)
    (outside / "secret").write_text("mine")
    named = [(name.format(outside=outside), kind, content.format(outside=outside)) for name, kind, content in members]
    path = archive(tmp_path / "a.tar.gz", ("good", tarfile.REGTYPE, "fine"), *named)
    with pytest.raises(ConfigurationError, match=r"a\.tar\.gz: refused: its entry .* Nothing was unpacked"):
        unpack(path, folder)
    assert (sorted(os.listdir(outside)), os.listdir(folder)) == (["folder", "secret"], [])


def test_files_get_the_users_own_permissions(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", ("a/b", tarfile.REGTYPE, "fine"))
    before = os.umask(0o027)
    try:
        unpack(path, tmp_path / "folder")
    finally:
        os.umask(before)
    assert (tmp_path / "folder/a/b").read_text() == "fine"
    assert (tmp_path / "folder/a/b").stat().st_mode & 0o7777 == 0o640


@pytest.mark.parametrize(
    "injury", [lambda raw: raw[:-20], lambda raw: raw[:60], lambda raw: b"", lambda raw: b"x" * 99]
)
def test_damaged_archives(tmp_path: Path, injury: Callable[[bytes], bytes]) -> None:
    path = archive(tmp_path / "a.tar.gz", ("a", tarfile.REGTYPE, "fine" * 999))
    path.write_bytes(injury(path.read_bytes()))
    with pytest.raises(ConfigurationError, match=r"a\.tar\.gz: not a complete archive"):
        unpack(path, tmp_path / "folder")


def test_a_set_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path)
    facts: dict[str, Any] = {}
    for place, extra in (("good", []), ("hostile", [("../../../escaped", tarfile.REGTYPE, "owned")])):
        (tmp_path / place).mkdir()
        path = tmp_path / place / CIFAR10.filename
        write_archive(tmp_path / CIFAR10.base_folder, path)
        if extra:
            archive(path, *extra)
        facts = published(tmp_path / CIFAR10.base_folder, path, "http://127.0.0.1:9/none")
        recipe = DataRecipe(dataset="cifar10", root=str(tmp_path / place), download=False)
        source = type("Small", (CIFAR10,), facts)
        if extra:
            with pytest.raises(ConfigurationError, match="refused"):
                load_cifar(recipe, source)
            assert os.listdir(tmp_path / place) == [CIFAR10.filename]
            assert not list(tmp_path.rglob("escaped"))
        else:
            assert len(load_cifar(recipe, source).train) == 5 * ROWS
