"""A run behind a URL, as objects: laid out as a run directory is, with each manifest as its checkpoint's commit marker.

    URL/recipe.toml, evaluation.json, mlflow.json, logs/…
    URL/journal.jsonl, journal-00001.jsonl, …      the journal in pieces, since an object cannot be appended to
    URL/checkpoints/step-00000500/…                a checkpoint exists when its manifest.json does
    URL/lease.json                                 who writes here

A second checkpoint of the same step does not touch the first: it is called step-00000500.2.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.checkpoint import verify_checkpoint
from disttrain.checkpoint.folder import WRITING, hidden
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.faultpoints import reached
from disttrain.files import open_to_read, parse_json
from disttrain.layout import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    CONTENTS,
    JOURNAL,
    MANIFEST,
    STATE,
    contents_of,
    metrics_in,
)
from disttrain.recipe.address import file_system

_NAME = re.compile(rf"{CHECKPOINT_NAME.pattern}(?:\.(\d+))?")
_DAMAGED = "damaged.txt"
_JOURNAL_PIECE = 8 * 2**20  # bytes


@dataclass(frozen=True)
class Standing:
    """The names of the checkpoints of a run, oldest first."""

    good: list[str]  # committed, and not known to be damaged
    damaged: list[str]  # quarantined
    unfinished: list[str]  # what a killed upload or removal has left


class RemoteRun:
    """The objects of the run behind `url`. Every method raises OSError if it fails or cannot be reached."""

    def __init__(self, url: str) -> None:
        """Raises ConfigurationError if nothing installed can open the URL."""
        self.url = url.rstrip("/")
        self._files, self._root = file_system(self.url)

    def read(self, name: str) -> bytes | None:
        """The object's content; None if there is no such object."""
        with self._explained():
            try:
                return bytes(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Make or replace an object."""
        path = f"{self._root}/{name}"
        with self._explained():
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, content)

    def probe(self, name: str) -> None:
        """Make an object and remove it again, which shows whether this process may."""
        self.write(name, b"probe")
        with self._explained():
            self._files.rm_file(f"{self._root}/{name}")

    def write_journal(self, journal: Path, done: int) -> int:
        """Bring the whole lines of the journal there; those up to byte `done` are there. Return how far it is there.

        An object cannot be appended to, so the newest piece is written anew until it is full.
        """
        with open_to_read(journal) as file:
            number = done // _JOURNAL_PIECE
            file.seek(number * _JOURNAL_PIECE)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        for begin in range(0, len(content), _JOURNAL_PIECE):
            self.write(_piece(number + begin // _JOURNAL_PIECE), content[begin : begin + _JOURNAL_PIECE])
        return number * _JOURNAL_PIECE + len(content)

    def read_journal(self) -> bytes:
        """The journal, as far as it is there."""
        pieces: list[bytes] = []
        while (piece := self.read(_piece(len(pieces)))) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    def objects(self, folder: str) -> list[str]:
        """The names of all objects below a folder of the run."""
        with self._explained():
            self._files.invalidate_cache()
            try:
                found = self._files.find(f"{self._root}/{folder}")
            except FileNotFoundError:
                return []
        root = self._files._strip_protocol(self._root).strip("/") + "/"
        return [path.strip("/").removeprefix(root) for path in map(str, found)]

    def checkpoints(self) -> Standing:
        """What there is of checkpoints."""
        folders: dict[str, set[str]] = {}
        for path in self.objects(CHECKPOINTS):
            _, name, *file = path.split("/")
            if _NAME.fullmatch(name) and len(file) == 1:  # other names are not ours
                folders.setdefault(name, set()).add(file[0])
        names = sorted(folders, key=step_and_revision)
        return Standing(
            good=[name for name in names if MANIFEST in folders[name] and _DAMAGED not in folders[name]],
            damaged=[name for name in names if _DAMAGED in folders[name]],
            unfinished=[name for name in names if not folders[name] & {MANIFEST, _DAMAGED}],
        )

    def put_checkpoint(self, folder: Path, name: str) -> None:
        """Bring a checkpoint there: its manifest last, when every other file is there in its full length.

        Files that other machines have brought by `put` need not be in the folder.
        """
        place = f"{self._root}/{CHECKPOINTS}/{name}"
        manifest = (folder / MANIFEST).read_bytes()
        listed = as_json(manifest)
        files = contents_of(listed) or CONTENTS
        with self._explained():
            self._files.makedirs(place, exist_ok=True)
            reached("mirror: begun", checkpoint=name)
            for file in files:
                local = folder / file
                if local.exists() or file not in listed.get("files", {}):
                    self._files.put_file(str(local), f"{place}/{file}")
                    self._check_size(f"{place}/{file}", local.stat().st_size)
                else:
                    self._check_size(f"{place}/{file}", listed["files"][file]["size"])
        reached("mirror: tensors", checkpoint=name)
        self.write(f"checkpoints/{name}/{MANIFEST}", manifest)
        reached("mirror: committed", checkpoint=name)

    def put(self, file: Path, checkpoint: str, is_alive: Callable[[], None]) -> None:
        """Bring one file of a checkpoint there, calling `is_alive` with each piece, if the library sends pieces."""
        from fsspec.callbacks import Callback  # only here: runs in folders need no fsspec

        place = f"{self._root}/{CHECKPOINTS}/{checkpoint}"
        with self._explained():
            self._files.makedirs(place, exist_ok=True)
            callback = Callback(hooks={"alive": lambda *_, **__: is_alive()})
            self._files.put_file(str(file), f"{place}/{file.name}", callback=callback)
            self._check_size(f"{place}/{file.name}", file.stat().st_size)

    def _check_size(self, path: str, size: int) -> None:
        self._files.invalidate_cache()
        if self._files.info(path)["size"] != size:
            raise OSError(f"{path.removeprefix(f'{self._root}/')} arrived incomplete")

    def get_checkpoint(self, name: str, path: Path, files: tuple[str, ...] | None = None) -> None:
        """Fetch a checkpoint, or some of its files, to the folder `path`, which comes to be only if all arrived.

        Raises ConfigurationError if it is damaged. Nothing that the remote side sends is used as a path.
        """
        place = f"{self._root}/{CHECKPOINTS}/{name}"
        self._get(place, path, files)

    def get_plain_checkpoint(self, path: Path) -> None:
        """The same for a URL that is a checkpoint itself."""
        self._get(self._root, path, None)

    def _get(self, place: str, path: Path, files: tuple[str, ...] | None) -> None:
        temporary = hidden(path, WRITING)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._get_files(place, temporary, (MANIFEST,))
            manifest = temporary / MANIFEST
            listed = contents_of(as_json(manifest.read_bytes())) if manifest.exists() else None
            self._get_files(place, temporary, files or listed or CONTENTS)
            if files is None:
                verify_checkpoint(temporary)
            temporary.rename(path)
        except ConfigurationError as error:
            there = f"{self._files.unstrip_protocol(place)}"
            raise ConfigurationError(str(error).replace(str(temporary), there)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _get_files(self, place: str, folder: Path, names: tuple[str, ...]) -> None:
        with self._explained():
            for name in names:
                try:
                    self._files.get_file(f"{place}/{name}", str(folder / name))
                except FileNotFoundError:
                    (folder / name).unlink(missing_ok=True)  # verification names what is missing

    def quarantine(self, name: str, why: str) -> None:
        """Mark a damaged checkpoint: it is left as it is, and no longer used."""
        self.write(f"checkpoints/{name}/{_DAMAGED}", why.encode())

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint, its commit marker first."""
        place = f"{self._root}/{CHECKPOINTS}/{name}"
        with self._explained():
            if self._files.exists(f"{place}/{MANIFEST}"):
                self._files.rm_file(f"{place}/{MANIFEST}")
            reached("mirror: retired", checkpoint=name)
            self._files.rm(place, recursive=True)
            self._files.invalidate_cache()

    def manifest(self, name: str) -> bytes | None:
        """A checkpoint's manifest; None if it is not committed."""
        return self.read(f"checkpoints/{name}/{MANIFEST}")

    def metrics(self, name: str) -> dict[str, float]:
        """What was measured at a checkpoint, by name."""
        try:
            return metrics_in(parse_json(self.read(f"checkpoints/{name}/{STATE}") or b"{}"))
        except ValueError:
            return {}

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Around what is done first: a URL that does not exist or is forbidden is reported as the user's error."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise ConfigurationError(f"{error}. Check the address and the credentials.") from error
        except OSError as error:
            raise DisttrainError(f"{error}. Try again when it can be reached.") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Libraries raise errors of many kinds: from here they are OSErrors that name the URL."""
        try:
            yield
        except OSError as error:
            raise type(error)(f"{self.url}: {error}") from error
        except ConfigurationError:
            raise
        except Exception as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error


def step_and_revision(name: str) -> tuple[int, int]:
    """What a remote checkpoint's name holds: its step, and which of that step it is, from 1."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2] or 1)


def next_revision(name: str) -> str:
    """The name of the next checkpoint of the same step."""
    _, revision = step_and_revision(name)
    return f"{name.partition('.')[0]}.{revision + 1}"


def _piece(number: int) -> str:
    return JOURNAL.replace(".", f"-{number:05d}.") if number else JOURNAL


def as_json(content: bytes | None) -> dict[str, Any]:
    """The JSON object in an object's content; an empty one for anything else."""
    try:
        value = parse_json(content or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
