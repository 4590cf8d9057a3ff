"""Data sets as memory maps: converted once per machine, then shared by its workers through the page cache.

One safetensors file per data set. Its name holds a digest of where the data came from, so a changed source gets a new
file and a stale one is never read. A file is written under a temporary name and published whole; one that others may
have mapped is never replaced, which a network file system would not forgive. The folder may be deleted at any time when
no run uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from disttrain.data.dataset import Datasets, MemorySplit
from disttrain.errors import ConfigurationError
from disttrain.files import make_folder, refuse_irregular

_log = logging.getLogger(__name__)
_FORMAT = "2"
_TENSORS = ("train.images", "train.labels", "test.images", "test.labels")
_OF_WRONG_FACTS = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


def fingerprint(parts: Iterable[str], files: Iterable[Path], root: Path) -> str:
    """A digest of `parts` and of the name, size and time of change of each of `files` under `root`."""
    digest = hashlib.sha256()
    for part in (_FORMAT, *parts):
        digest.update(part.encode() + b"\0")
    for file in files:
        status = file.stat()
        name = os.fsencode(file.relative_to(root))  # which need not be text
        digest.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def cached(root: Path, name: str, build: Callable[[], Datasets]) -> Datasets:
    """The data set `name`, mapped from its file; `build` makes it, of MemorySplits, if there is none.

    The file is in `root`/.disttrain, or below the user's cache folder where `root` cannot be written to. Where neither
    can, the data set stays in this worker's own memory, with a warning.
    """
    folders = [root / ".disttrain"]
    with suppress(RuntimeError):  # neither HOME nor an entry in passwd
        elsewhere = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "disttrain"
        folders.append(elsewhere / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16])
    files = [folder / f"{name}.safetensors" for folder in folders]
    for file in files:
        datasets = _mapped(file)
        if datasets is not None:
            return datasets
    built = build()
    reasons = []
    for file in files:
        try:
            _publish(built, file)
        except (OSError, SafetensorError) as error:
            reasons.append(f"{file.parent}: {error}")
            continue
        return _mapped(file) or built
    _log.warning(
        "The converted data set could not be cached, so each worker holds its own copy: %s", "; ".join(reasons)
    )
    return built


def _mapped(file: Path) -> Datasets | None:
    try:
        refuse_irregular(file, follow=True)  # a pipe, say, would be waited for
        # A private map: pages come from the page cache, whoever read them first, and the file cannot be written to.
        with safe_open(file, framework="pt") as opened:
            facts = json.loads(opened.metadata()["disttrain"])
            tensors = {name: opened.get_tensor(name) for name in _TENSORS}
            sums = facts.pop("crc32")
            for name, found in (("facts", _crc32_of_facts(facts)), *((n, _crc32(t)) for n, t in tensors.items())):
                if sums[name] != found:
                    raise ValueError(f"the checksum of its {name} differs")
            splits = {
                which: MemorySplit(
                    tensors[f"{which}.images"],
                    tensors[f"{which}.labels"],
                    classes=tuple(facts["classes"]),
                    mean=tuple(facts["mean"]),
                    std=tuple(facts["std"]),
                )
                for which in ("train", "test")
            }
            return Datasets(**splits)
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's private file
        return None
    except (OSError, SafetensorError, ConfigurationError, *_OF_WRONG_FACTS) as error:
        _log.warning("%s is damaged and is recreated: %s", file, error)
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None


def _crc32(tensor: torch.Tensor) -> int:
    """Finds what a disk or a copy has damaged; a gibibyte takes a third of a second, once a start."""
    flat: Any = tensor.contiguous().view(-1).numpy()
    return zlib.crc32(flat)


def _crc32_of_facts(facts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _publish(datasets: Datasets, file: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for which, split in (("train", datasets.train), ("test", datasets.test)):
        assert isinstance(split, MemorySplit)
        tensors |= {f"{which}.images": split.images.contiguous(), f"{which}.labels": split.labels.contiguous()}
    sums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    facts: dict[str, Any] = {"classes": split.classes, "mean": split.mean, "std": split.std}
    facts["crc32"] = {**sums, "facts": _crc32_of_facts(facts)}
    make_folder(file.parent)  # not through a link, which would put the file anywhere
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"disttrain": json.dumps(facts)})
        # safetensors writes for its owner alone; what may be read in this folder, others may read too.
        temporary.chmod(file.parent.stat().st_mode & 0o666)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            return  # another machine was quicker; its file holds the same
        except OSError:  # a file system without links
            temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
