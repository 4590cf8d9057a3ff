"""CIFAR-10 and CIFAR-100, in the published layout: batches that Python 2 pickled."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from disttrain.data.dataset import Datasets, MemorySplit
from disttrain.data.sources.archive import unpack
from disttrain.data.sources.cache import cached, fingerprint
from disttrain.data.sources.unpickle import read_pickle
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from disttrain.recipe.address import expanded

_log = logging.getLogger(__name__)
_DOWNLOAD_TIMEOUT_S = 60.0
# Mean and standard deviation of each channel over all pixels of the training images.
_STATISTICS = {
    CIFAR10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    CIFAR100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load_cifar(data: DataRecipe, source: type[CIFAR10] = CIFAR10) -> Datasets:
    """The set that `source` describes, from `data.root`, downloaded if it is not there and may be.

    `source` is CIFAR10, CIFAR100, or a subclass with an address, file names and md5 sums of its own: its attributes are
    used, and it is never instantiated. Raises ConfigurationError for whatever is missing, altered or damaged.
    """
    root = expanded(data.root)
    folder = root / source.base_folder
    if not folder.is_dir():
        _obtain(root, source, download=data.download)
    sums = {folder / name: md5 for name, md5 in [*source.train_list, *source.test_list]}
    sums[folder / source.meta["filename"]] = source.meta["md5"]
    for file in sums:
        if not file.is_file():
            raise ConfigurationError(
                f"data.root: {folder} is incomplete, {file.name} is missing; remove it or complete it."
            )

    def build() -> Datasets:
        if data.verify:
            _verify(sums)
        return _read(folder, source)

    digest = fingerprint([source.base_folder, str(data.verify)], sums, root)
    return cached(root, f"{source.base_folder}-{digest}", build)


def _obtain(root: Path, source: type[CIFAR10], *, download: bool) -> None:
    """Put the unpacked folder into `root`, whole or not at all, from the archive there or from the publisher."""
    archive = root / source.filename
    if (root / source.train_list[0][0]).is_file():
        raise ConfigurationError(f"data.root: {root} holds the batches themselves; give the folder above it.")
    if not archive.is_file() and not download:
        raise ConfigurationError(
            f"data.root: there is no {source.base_folder} in {root}; point data.root to its parent folder, "
            "or set data.download=true."
        )
    if archive.is_file() and not check_integrity(archive, source.tgz_md5):
        raise ConfigurationError(
            f"data.root: {archive} does not have the published md5 sum; remove it, or unpack it yourself "
            "and set data.verify=false."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that a killed download leaves nothing that looks like a data set, and machines
        # that share `root` do not write into each other's files.
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as staging:
            if not archive.is_file():
                _log.info("Downloading %s to %s", source.url, root)
                with _bounded_and_quiet():
                    download_url(source.url, staging, filename=source.filename, md5=source.tgz_md5)
                archive = Path(staging) / source.filename
            unpack(archive, Path(staging) / "unpacked")
            _move_in(Path(staging) / "unpacked" / source.base_folder, root / source.base_folder)
    except (URLError, TimeoutError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, RuntimeError):  # torchvision's error for a wrong md5 sum
            reason = "the download does not have the published md5 sum"
        raise ConfigurationError(
            f"data.root: there is no {source.base_folder} in {root}, and downloading {source.url} failed: {reason}. "
            f"Put {source.filename} into {root} yourself, or retry later."
        ) from error
    except OSError as error:
        raise ConfigurationError(f"data.root: {source.base_folder} cannot be unpacked in {root}: {error}.") from error


def _move_in(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another machine was quicker
            raise


@contextlib.contextmanager
def _bounded_and_quiet() -> Iterator[None]:
    """torchvision's download never gives up by itself, and draws its progress bar even into a file."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _verify(sums: dict[Path, str]) -> None:
    for file, md5 in sums.items():
        if not check_integrity(file, md5):
            raise ConfigurationError(
                f"data.verify: {file} does not have the published md5 sum. Set data.verify=false to accept an altered "
                f"copy, or remove {file.parent} to download it again."
            )


def _read(folder: Path, source: type[CIFAR10]) -> Datasets:
    meta = folder / source.meta["filename"]
    names = _table(meta).get(source.meta["key"])
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"{meta}: {source.meta['key']!r} is not a list of class names; replace the file.")
    kind = CIFAR100 if issubclass(source, CIFAR100) else CIFAR10
    mean, std = _STATISTICS[kind]

    def split(files: list[list[str]]) -> MemorySplit:
        parts = [_read_batch(folder / name, len(names)) for name, _ in files]
        images = torch.from_numpy(np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32))
        return MemorySplit(images, torch.cat([labels for _, labels in parts]), tuple(names), mean, std)

    return Datasets(split(source.train_list), split(source.test_list))


def _read_batch(file: Path, num_classes: int) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    table = _table(file)
    pixels, labels = table.get("data"), table.get("labels", table.get("fine_labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
        raise ConfigurationError(f"{file}: 'data' is not a matrix of 3072 bytes a row; replace the file.")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise ConfigurationError(f"{file}: the labels are not numbers from 0 to {num_classes - 1}; replace the file.")
    if len(labels) != len(pixels):
        raise ConfigurationError(f"{file}: {len(pixels)} images and {len(labels)} labels; replace the file.")
    return pixels, torch.tensor(labels, dtype=torch.int64)


def _table(file: Path) -> dict[str, Any]:
    table = read_pickle(file)
    if not isinstance(table, dict):
        raise ConfigurationError(
            f"{file}: holds a {type(table).__name__} where a dictionary belongs; replace the file."
        )
    return table
