"""The journal: one JSON object per line, append-only, the complete record of a job across all its restarts.

Every record has `time` (seconds since the epoch) and `kind`; the rest depends on the kind:

| kind       | further fields                                                                    |
|------------|-----------------------------------------------------------------------------------|
| `journal`  | `version`, `job` (a random name, once, on the first line)                         |
| `params`   | `params`: {name: value}                                                           |
| `tags`     | `tags`: {name: text}                                                              |
| `metrics`  | `step`, `metrics`: {name: number, or "NaN", "Infinity", "-Infinity"}              |
| `event`    | `name` (start, resume, checkpoint, evaluated, stopped, …) and what belongs to it  |
| `artifact` | `path` relative to the run directory, `artifact_path`: the folder it goes to      |
| `model`    | `path` of an exported model, relative to the run directory, `step`                |
| `status`   | `status`: RUNNING, FINISHED, FAILED or KILLED                                     |

A reader must skip kinds it does not know.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from disttrain.files import open_safely, open_to_read
from disttrain.runs.redact import redact
from disttrain.runs.strict_json import as_text, strict_json

_VERSION = 1
_MAX_HELD_BYTES = 16 * 2**20  # how much is held in memory on a full disk before records are dropped


class Journal:
    """Appends records to a journal file. Safe to use from several threads; one process at a time.

    A line that a killed writer left unfinished is cut off at opening. Each record goes to the operating system in one
    write, so that it survives the death of the process; `sync` makes it survive the death of the machine.
    """

    def __init__(
        self, path: str | os.PathLike[str], first_step: int = 0, guard: Callable[[], object] = lambda: None
    ) -> None:
        """Open or create the file at `path`; its folder must exist. Metrics of earlier steps than `first_step` will not
        be journalled again. `guard` is called before each write, see `fence.Fence`. Raises OSError.
        """
        self.path, self._guard = Path(path), guard
        self._lock = threading.Lock()
        self._held = b""
        self._first_step = first_step
        # By metric: the last step that this process journalled, and the steps that earlier ones did. Not the highest of
        # them: one wrong digit in a line must not keep every later step out.
        self._last: dict[str, int] = {}
        self._earlier: dict[str, set[int]] = {}
        self.model_step: int | None = None
        """The step of the last exported model that is journalled."""
        self._params: dict[str, Any] = {}
        self._tags: dict[str, str] = {}
        self._fd = open_safely(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            self._repair()
        except BaseException:
            os.close(self._fd)
            raise

    def params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; those the journal already holds with the same value are left out."""
        with self._lock:
            news = {name: value for name, value in params.items() if self._params.get(name, _ABSENT) != _plain(value)}
            if news:
                self._params.update((name, _plain(value)) for name, value in news.items())
                self._append("params", params=news)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; those the journal already holds with the same text are left out."""
        with self._lock:
            news = {name: str(text) for name, text in tags.items() if self._tags.get(name) != str(text)}
            if news:
                self._tags.update(news)
                self._append("tags", tags=news)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step.

        A metric whose value at this step is journalled already is left out: a run that was killed repeats the steps
        since its last checkpoint, and they must count once.
        """
        with self._lock:
            news = {
                name: strict_json(float(value), as_text) for name, value in metrics.items() if self._is_new(name, step)
            }
            if news:
                self._last.update(dict.fromkeys(news, int(step)))
                self._append("metrics", step=int(step), metrics=news)

    def _is_new(self, name: str, step: int) -> bool:
        return step > self._last.get(name, -1) and step not in self._earlier.get(name, ())

    def event(self, name: str, **fields: Any) -> None:
        """Record that something happened."""
        self.append("event", name=name, **fields)

    def artifact(self, path: str, artifact_path: str = "") -> None:
        """Record that the file `path`, relative to the run directory, belongs into the folder `artifact_path`."""
        self.append("artifact", path=path, artifact_path=artifact_path)

    def append(self, kind: str, **fields: Any) -> None:
        """Record anything. Raises OSError when the file cannot be written; the next record then tries again."""
        with self._lock:
            self._append(kind, **fields)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        with self._lock:
            os.fsync(self._fd)

    def restore(self) -> None:
        """Recreate the file with all that it held if it was moved or deleted. Raises OSError."""
        with self._lock:
            if self._fd < 0 or _is_at(self.path, self._fd):
                return
            content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
            renewed = open_safely(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            there = os.pread(renewed, len(content) + 1, 0)
            if not content.startswith(there):
                os.close(renewed)
                raise OSError(errno.EEXIST, "another journal has taken the place of the job's", str(self.path))
            os.write(renewed, content[len(there) :])
            os.close(self._fd)
            self._fd = renewed

    def close(self) -> None:
        """Close the file; further records raise OSError."""
        with self._lock:
            if self._fd >= 0:
                if self._held:
                    with contextlib.suppress(OSError):
                        os.write(self._fd, self._held)
                os.close(self._fd)
                self._fd = -1

    def _append(self, kind: str, **fields: Any) -> None:
        record = {"time": round(time.time(), 3), "kind": kind, **fields}
        data = self._held + _encode(record)
        # A write may stop halfway on a full disk. Cutting the torn line off keeps the file whole, and holding the
        # records back until the next write keeps the journal complete once there is space again.
        size = os.fstat(self._fd).st_size
        self._guard()
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(f"{self.path}: the disk accepted only a part of a record")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            self._held = data if len(data) <= _MAX_HELD_BYTES else self._held
            raise
        self._held = b""

    def _repair(self) -> None:
        """Learn what the file holds, and make it end with a whole line."""
        whole = 0
        with open_to_read(self.path) as file:
            for line in file:
                record = decode(line)
                if not line.endswith(b"\n"):
                    if record is not None:  # only the line's end was lost
                        os.write(self._fd, b"\n")
                        whole += len(line) + 1
                        self._learn(record)
                    break
                whole += len(line)
                if record is not None:
                    self._learn(record)
        if os.fstat(self._fd).st_size > whole:
            os.ftruncate(self._fd, whole)
        if whole == 0:
            self._append("journal", version=_VERSION, job=uuid.uuid4().hex)

    def _learn(self, record: dict[str, Any]) -> None:
        match record:
            case {"kind": "metrics", "step": int(step), "metrics": dict(metrics)}:
                for name in metrics if step >= self._first_step else ():
                    self._earlier.setdefault(name, set()).add(step)
            case {"kind": "model", "step": int(step)}:
                self.model_step = step
            case {"kind": "params", "params": dict(params)}:
                self._params.update(params)
            case {"kind": "tags", "tags": dict(tags)}:
                self._tags.update(tags)


def read_journal(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The whole records of a journal, oldest first; metrics are floats again. Damaged lines are skipped.

    The journal may be in use by its writer: a line that has no end yet is left alone. Raises OSError.
    """
    for record, _ in read_records(path, 0):
        if record is not None:
            yield record


def read_records(path: str | os.PathLike[str], offset: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Each whole line from a byte offset on: its record, None if damaged, and the offset of its end."""
    with open_to_read(path) as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield decode(line), offset


def count_records(path: str | os.PathLike[str], offset: int) -> int:
    """How many whole lines follow the byte offset; 0 when there is no such file."""
    try:
        with open_to_read(path) as file:
            file.seek(offset)
            return sum(line.endswith(b"\n") for line in file)
    except FileNotFoundError:
        return 0


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


_ABSENT = object()


def _plain(value: Any) -> Any:
    """`value` as the journal gives it back."""
    return json.loads(redact(json.dumps(strict_json(value, as_text), default=str)))


def _encode(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, default=str, allow_nan=False)
    except (ValueError, TypeError):  # NaN, or a key that is not text: rare enough to look for only now
        text = json.dumps(strict_json(record, as_text), default=str, allow_nan=False)
    return redact(text).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    if record["kind"] == "metrics":
        try:
            record["metrics"] = {name: float(value) for name, value in record["metrics"].items()}
            record["step"] = int(record["step"])
            if not 0 <= record["step"] < 2**63:
                return None
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError):
            return None
    return record
