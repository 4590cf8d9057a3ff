"""Runs behind URLs for commands that only look: what they need of one, in a folder that is gone afterwards."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from disttrain.errors import ConfigurationError, DisttrainError, UsageError
from disttrain.layout import (
    CHARTS,
    CHECKPOINTS,
    DELIVERED,
    EVALUATION,
    EXPORTED,
    JOURNAL,
    MANIFEST,
    RECIPE,
    SPIKES,
    STATE,
)
from disttrain.recipe.address import file_system, is_url
from disttrain.remote.place import RemoteRun

Wanted = Literal["newest", "states", "none"]
_FILES = (RECIPE, EVALUATION, SPIKES, DELIVERED)


@contextmanager
def local_copy(address: str, checkpoints: Wanted) -> Iterator[Path]:
    """The run or checkpoint at `address`: a path as it is, or a copy of what is behind a URL, gone after the block.

    Of a run's checkpoints it has the newest good one, only the states of all, or none. Raises UsageError if there
    is nothing, ConfigurationError if what is wanted is damaged.
    """
    if not is_url(address):
        yield Path(address)
        return
    run = RemoteRun(address)
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        path = Path(folder) / (run.url.rpartition("/")[2] or "run")
        with run.opening():
            _fetch(run, path, checkpoints)
        try:
            yield path
        except DisttrainError as error:
            raise type(error)(str(error).replace(str(path), run.url)) from error


def _fetch(run: RemoteRun, path: Path, checkpoints: Wanted) -> None:
    if run.read(MANIFEST) is not None:
        run.get_plain_checkpoint(path)
        return
    if run.read(RECIPE) is None:
        raise UsageError(_is_neither(run))
    path.mkdir(parents=True)
    for name in _FILES:
        content = run.read(name)
        if content is not None:
            (path / name).write_bytes(content)
    (path / JOURNAL).write_bytes(run.read_journal())
    if checkpoints == "none":
        for name in (*run.objects(EXPORTED), *run.objects(CHARTS)):
            place = (path / name).resolve()
            if place.is_relative_to(path.resolve()):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(run.read(name) or b"")
        return
    names = run.checkpoints().good
    for name in reversed(names):
        place = path / CHECKPOINTS / name.partition(".")[0]
        if place.exists():
            continue  # a later one of the same step
        try:
            run.get_checkpoint(name, place, (STATE,) if checkpoints == "states" else None)
        except ConfigurationError as error:
            if name == names[0]:
                raise
            print(f"warning: {error} The previous checkpoint is used.", file=sys.stderr)
            continue
        if checkpoints == "newest":
            return


def verify_behind(url: str) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Verify each checkpoint behind a URL, of a run or itself one, by fetching it.

    Returns path, good and detail of each; the URLs of those that were quarantined, and of what is unfinished.
    Raises UsageError if there is neither a run nor a checkpoint.
    """
    run = RemoteRun(url)
    found = []
    with run.opening(), tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        is_checkpoint = run.read(MANIFEST) is not None
        if not is_checkpoint and run.read(RECIPE) is None:
            raise UsageError(_is_neither(run))
        there = run.checkpoints()
        for name in [""] if is_checkpoint else there.good:
            path = Path(folder) / "one"
            place = f"{run.url}/{CHECKPOINTS}/{name}" if name else run.url
            try:
                run.get_checkpoint(name, path) if name else run.get_plain_checkpoint(path)
            except ConfigurationError as error:
                found.append({"path": place, "good": False, "detail": str(error)})
            else:
                found.append({"path": place, "good": True, "detail": ""})
            shutil.rmtree(path, ignore_errors=True)
    quarantined, unfinished = (
        [f"{run.url}/{CHECKPOINTS}/{name}" for name in names] for names in (there.damaged, there.unfinished)
    )
    return found, quarantined, unfinished


def _is_neither(run: RemoteRun) -> str:
    return f"{run.url} is neither a run (no {RECIPE}) nor a checkpoint (no {MANIFEST})."


def runs_behind(url: str) -> list[str]:
    """The URLs of the runs behind a URL. Raises OSError."""
    files, root = file_system(url)
    files.invalidate_cache()
    found = [str(path).rstrip("/") for path in files.ls(root, detail=False)]
    return [
        f"{url.rstrip('/')}/{path.rpartition('/')[2]}" for path in sorted(found) if files.exists(f"{path}/{RECIPE}")
    ]
