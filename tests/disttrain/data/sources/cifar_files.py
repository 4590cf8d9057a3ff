"""Small data sets in CIFAR's layout, pickled as Python 2 did it: protocol 2, byte strings, numpy.core.multiarray."""

from __future__ import annotations

import hashlib
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

ROWS = 20
"""Images in each batch file."""
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def string(raw: bytes) -> bytes:
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw


def integer(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def a_list(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def matrix(pixels: np.ndarray[Any, Any], module: bytes = b"numpy.core.multiarray") -> bytes:
    """The opcodes NumPy of Python 2 wrote for a C-ordered uint8 array."""
    empty = b"c" + module + b"\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + integer(0) + b"tb"
    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    return empty + b"(" + integer(1) + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"


def a_dict(pairs: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(string(key.encode()) + value for key, value in pairs.items()) + b"u."


def batch(images: np.ndarray[Any, Any], labels: list[int], key: str = "labels") -> bytes:
    return a_dict(
        {"batch_label": string(b"b"), key: a_list([integer(label) for label in labels]), "data": matrix(images)}
    )


def write_cifar(root: Path, source: type[CIFAR10] = CIFAR10) -> dict[str, tuple[np.ndarray[Any, Any], list[int]]]:
    """Write a whole small set under `root`; returns each batch file's pixels, (ROWS, 3072), and labels."""
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    fine = issubclass(source, CIFAR100)
    names = [f"class {number}" for number in range(100)] if fine else CLASSES
    contents = {}
    for name, _ in [*source.train_list, *source.test_list]:
        pixels = random.integers(0, 256, (ROWS, 3072), dtype=np.uint8)
        labels = [int(label) for label in random.integers(0, len(names), ROWS)]
        (folder / name).write_bytes(batch(pixels, labels, "fine_labels" if fine else "labels"))
        contents[name] = pixels, labels
    key = source.meta["key"]
    (folder / source.meta["filename"]).write_bytes(a_dict({key: a_list([string(name.encode()) for name in names])}))
    return contents


def write_archive(folder: Path, archive: Path) -> None:
    """Pack an unpacked set as its publisher does."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def published(folder: Path, archive: Path, url: str) -> dict[str, Any]:
    """The attributes of a CIFAR10 subclass whose files are these: address, names and md5 sums."""

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()

    return {
        "url": url,
        "filename": archive.name,
        "tgz_md5": md5(archive),
        "train_list": [[name, md5(folder / name)] for name, _ in CIFAR10.train_list],
        "test_list": [[name, md5(folder / name)] for name, _ in CIFAR10.test_list],
        "meta": CIFAR10.meta | {"md5": md5(folder / "batches.meta")},
    }
