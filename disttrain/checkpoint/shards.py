"""A checkpoint that all ranks write: each its rows of the tensors, beside the training; rank 0 commits it."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from disttrain.checkpoint.folder import WRITING, hidden, write_file
from disttrain.checkpoint.store import CheckpointStore
from disttrain.checkpoint.tensors import Tensors, safetensors_pieces
from disttrain.distributed.notices import Notices
from disttrain.distributed.sharded import is_sharded, local, place_of, rows_of
from disttrain.distributed.world import World
from disttrain.errors import brief
from disttrain.faultpoints import reached
from disttrain.layout import MODEL, OPTIMIZER, checkpoint_name, shard_names

_PATIENCE_AT_THE_END_S = 10.0  # for ranks that may have gone
_SIGN_OF_LIFE_S = 1.0


class Elsewhere(Protocol):
    """Where a checkpoint comes together that no folder has whole, since the machines share none."""

    def can_write(self, probe: str) -> bool:
        """Whether this rank can write there, which an object of this name shows that is removed again."""

    def reserve(self, checkpoint: str) -> str:
        """A name for the checkpoint under which there is none, and nothing is cleared up until `release`.

        Rank 0 asks. Raises OSError.
        """

    def release(self, name: str) -> None:
        """The save is over, one way or the other."""

    def put(self, file: Path, name: str, is_alive: Callable[[], None]) -> None:
        """Bring a file there, and call `is_alive` again and again meanwhile. Raises OSError."""


class ShardStore:
    """Saves to a store what the ranks hold together. Every rank has one, and all save the same steps in the same order.

    Rank 0 makes the folder; each rank writes its files into it, and leaves a notice with their size and SHA-256; when
    all have, rank 0 writes the manifest. Only notices are waited for, and only on the writers' threads.

    With `elsewhere`, ranks that cannot reach the folder bring their files there from a folder of their own, `scratch`,
    before they leave the notice: rank 0's folder then lacks these.
    """

    def __init__(
        self,
        store: CheckpointStore,
        notices: Notices,
        world: World,
        patience_s: float,
        elsewhere: Elsewhere | None = None,
        scratch: Path | None = None,
    ) -> None:
        """`patience_s`: how long a rank may write nothing of its part until the save fails."""
        self._store, self._notices, self._world, self._patience_s = store, notices, world, patience_s
        self._elsewhere, self._scratch = elsewhere, scratch
        self._numbers = itertools.count()
        self._places: dict[str, dict[str, list[Any]]] = {MODEL: {}, OPTIMIZER: {}}  # shape, and first row here
        self._closed_at: float | None = None
        self._last_sign = time.monotonic()

    @property
    def needs_elsewhere(self) -> bool:
        """Whether no checkpoint can be without the place where the ranks bring their files: the same on every rank."""
        return self._elsewhere is not None

    @torch.no_grad()
    def mine(self, model: Tensors, optimizer: Tensors) -> tuple[Tensors, Tensors]:
        """Of the tensors of a checkpoint the parts that this rank writes, in the memory where they are."""
        return self._mine(MODEL, model), self._mine(OPTIMIZER, optimizer)

    def _mine(self, file: str, tensors: Tensors) -> Tensors:
        parts: dict[str, torch.Tensor] = {}
        loads: list[int] = []  # how much the ranks of each copy write: what several have, the least busy writes
        for name, tensor in tensors.items():
            here, begin, writes = local(tensor.detach()), 0, self._world.is_main
            if is_sharded(tensor):
                place = place_of(tensor)
                loads += [0] * (place.num_copies - len(loads))
                writer = loads.index(min(loads[: place.num_copies]))
                loads[writer] += tensor.numel()
                # The shape and type of an empty one must be somewhere.
                writes = place.copy == writer and bool(here.numel() or place.part == 0)
                begin = rows_of(tensor).start
            if writes:
                parts[name] = here
                # Where a tensor is cut stays as it is for the life of a model, so a save under way may see this.
                self._places[file][name] = [list(tensor.shape), begin]
        return parts

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `state["step"]`; on rank 0 it is there afterwards.

        Raises OSError, on rank 0 with the rank that could not write.
        """
        number, tensors = next(self._numbers), {MODEL: model, OPTIMIZER: optimizer}
        return (self._lead if self._world.is_main else self._follow)(number, tensors, state)

    def abandon(self, why: str) -> None:
        """Leave out a save: what this rank has is no part of a checkpoint. The others are not left waiting."""
        number = next(self._numbers)
        if self._world.is_main:
            self._notices.post(f"{number}/begun", "")
        else:
            self._report(number, self._failure(why))

    def close(self) -> None:
        """From now on do not wait long for ranks that may have gone."""
        self._patience_s, self._closed_at = _PATIENCE_AT_THE_END_S, time.monotonic()

    def _lead(self, number: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        has_begun, name = False, ""

        def write_tensors(folder: Path) -> dict[str, Any]:
            nonlocal has_begun
            has_begun = True
            self._notices.post(f"{number}/begun", name or folder.name)
            reports = [self._written(number, folder, tensors, state["step"])]
            reports += [self._report_of(number, rank) for rank in range(1, self._world.size)]  # all, before any fails
            failure = next((report["error"] for report in reports if "error" in report), None)
            if failure is not None:
                raise OSError(failure)
            return _manifest(reports)

        try:
            if self._elsewhere is not None:
                name = self._elsewhere.reserve(checkpoint_name(state["step"]))
            return self._store.commit(state, write_tensors)
        finally:
            if self._elsewhere is not None and name:
                self._elsewhere.release(name)
            if not has_begun:
                self._notices.post(f"{number}/begun", "")

    def _follow(self, number: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        path = self._store.folder / checkpoint_name(state["step"])
        if name := self._notices.wait_for(f"{number}/begun", self._gives_up):
            if self._scratch is None:
                report = self._written(number, hidden(path, WRITING), tensors, state["step"])
            else:
                report = self._brought(number, self._scratch, name, tensors, state["step"])
            self._report(number, report)
            reached("shard: reported", step=state["step"])
        return path

    def _brought(
        self, number: int, scratch: Path, name: str, tensors: Mapping[str, Tensors], step: int
    ) -> dict[str, Any]:
        """As `_written`, and the files are then where the checkpoint `name` comes together, and not here."""
        assert self._elsewhere is not None
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            report = self._written(number, scratch, tensors, step)
            for file in report.get("files", ()):
                self._elsewhere.put(scratch / file, name, lambda: self._show_life(f"{number}.{time.monotonic()}"))
            reached("shard: brought", step=step)
        except Exception as error:
            return self._failure(error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return report

    def _written(self, number: int, folder: Path, tensors: Mapping[str, Tensors], step: int) -> dict[str, Any]:
        """Write this rank's files; what the manifest says of them, or why they could not be written."""
        files = {}
        try:
            reached("shard: begun", step=step)
            for file, parts in tensors.items():
                name = shard_names(file, self._world.size)[self._world.rank]
                files[name] = write_file(folder / name, self._showing_life(number, safetensors_pieces(parts)))
                reached(f"shard: {file.partition('.')[0]}", step=step)
        except Exception as error:
            return self._failure(error)
        places = {file: {name: self._places[file][name] for name in parts} for file, parts in tensors.items()}
        return {"files": files, "places": places}

    def _showing_life(self, number: int, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """The pieces, with a sign of life every second or so."""
        for count, piece in enumerate(pieces):
            self._show_life(f"{number}.{count}")
            yield piece

    def _show_life(self, sign: str) -> None:
        if not self._world.is_main and time.monotonic() - self._last_sign >= _SIGN_OF_LIFE_S:
            self._last_sign = time.monotonic()
            self._notices.post(f"life-{self._world.rank}", sign)

    def _failure(self, why: object) -> dict[str, Any]:
        return {"error": f"rank {self._world.rank} on {self._world.host}: {why}"}

    def _report(self, number: int, report: Mapping[str, Any]) -> None:
        self._notices.post(f"{number}/rank-{self._world.rank}", json.dumps(report))

    def _report_of(self, number: int, rank: int) -> dict[str, Any]:
        sign: str | None = None
        since = time.monotonic()

        def gives_up() -> bool:
            nonlocal sign, since
            if (seen := self._notices.seen(f"life-{rank}")) != sign:
                sign, since = seen, time.monotonic()
            return time.monotonic() - max(since, self._closed_at or since) >= self._patience_s

        try:
            text = self._notices.wait_for(f"{number}/rank-{rank}", gives_up, removes=True)
        except OSError as error:
            return {"error": brief(error)}
        report: dict[str, Any] = (
            json.loads(text) if text else {"error": f"rank {rank} has written nothing for {self._patience_s:g} s"}
        )
        return report

    def _gives_up(self) -> bool:  # rank 0 is there as long as the store is
        return self._closed_at is not None and time.monotonic() - self._closed_at >= self._patience_s


def _manifest(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest holds of the tensors, from the reports by rank."""
    tables: dict[str, dict[str, Any]] = {}
    for file in (MODEL, OPTIMIZER):
        table = tables[file.partition(".")[0]] = {}
        for rank, report in enumerate(reports):
            for name, (shape, begin) in report["places"][file].items():
                table.setdefault(name, {"shape": shape, "parts": []})["parts"].append([rank, begin])
        for entry in table.values():
            entry["parts"].sort(key=lambda part: part[1])
    files = {name: fingerprint for report in reports for name, fingerprint in report["files"].items()}
    return {"format": 2, "files": files, "tensors": tables}
