"""The checkpoints of one run: find the newest good one, quarantine damaged ones, retire old ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from disttrain.checkpoint.folder import (
    LEAVING,
    REPLACED,
    RETIRED,
    WRITING,
    Checkpoint,
    commit_checkpoint,
    hidden,
    read_checkpoint,
    verify_checkpoint,
    write_tensors,
)
from disttrain.checkpoint.tensors import Tensors
from disttrain.errors import ConfigurationError
from disttrain.faultpoints import reached
from disttrain.layout import STEP, Best, checkpoint_name, checkpoints_in, metrics_of, step_of

Name = TypeVar("Name", bound=Hashable)


class CheckpointStore:
    """A run's folder of checkpoints. One process writes to it; any may read."""

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1) -> None:
        self.folder = folder
        self._keep_last = max(1, keep_last)
        self._keep_best = keep_best
        self._best = Best()
        self.guard: Callable[[], object] = lambda: None
        """Called before anything gets or loses its place in the folder; it may end the process."""
        self._known_good: set[str] = set()  # written or verified by this store

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return checkpoints_in(self.folder)

    def rank_by(self, best: Best) -> None:
        """Keep the best by this metric from now on."""
        self._best = best

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `state["step"]`, then retire those that are no longer needed. Raises OSError.

        The same step again, with more known about it (an evaluation), replaces the old one.
        """
        return self.commit(state, lambda folder: write_tensors(folder, model, optimizer))

    def commit(self, state: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]) -> Path:
        """The same with tensors that `write` writes: see `commit_checkpoint`."""
        path = self.folder / checkpoint_name(state["step"])
        commit_checkpoint(path, state, write, self.guard)
        self._known_good.add(path.name)
        self._retire()
        return path

    def find(self, state: Mapping[str, Any]) -> Path | None:
        """Where the checkpoint of `state["step"]` is, with an evaluation if the state has one; None if it is not."""
        path = self.folder / checkpoint_name(state["step"])
        return path if path.is_dir() and (not state["metrics"] or metrics_of(path)) else None

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest good checkpoint, or None. Damaged ones are quarantined: renamed, and named to `warn`."""
        oldest_first = self.paths()
        for path in reversed(oldest_first):
            try:
                checkpoint = read_checkpoint(path)
            except ConfigurationError as error:
                quarantined = _quarantine(path)
                others = path != oldest_first[0]
                what = "the previous checkpoint is used" if others else "there is no other, so training starts over"
                warn(f"{error} Quarantined as {quarantined.name}; {what}.")
            else:
                self._known_good.add(path.name)
                return checkpoint
        return None

    def abandon(self, why: str) -> None:
        """Leave out a save of what turned out to be no checkpoint."""

    def settle(self, patience_s: float) -> Iterator[bool]:
        """Wait until the checkpoints are where the run lives: true, at last. In a folder they are there already."""
        yield True

    def quarantined(self) -> list[Path]:
        """The damaged ones that were quarantined."""
        return sorted(self.folder.glob(f"{STEP}*.damaged*"))

    def unfinished(self) -> list[Path]:
        """What is being written, replaced, removed or uploaded; if no job runs, what a killed one left so."""
        return sorted(
            path for stage in (WRITING, REPLACED, RETIRED, LEAVING) for path in self.folder.glob(f".{STEP}*.{stage}")
        )

    def clear_unfinished(self) -> None:
        """Finish or undo what a killed writer left under a temporary name. Only the owner of the run may."""
        for path in self.unfinished():
            original = path.with_name(path.stem.removeprefix("."))
            if path.suffix == f".{REPLACED}" and not original.exists():
                path.rename(original)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _retire(self) -> None:
        """Remove those that are not to be kept, once every one that is has been found good."""
        while True:
            paths = self.paths()
            scored = [(path, step_of(path), self._best.score(metrics_of(path))) for path in paths]
            keep = to_keep(scored, self._keep_last, self._keep_best)
            damaged = [path for path in keep if path.name not in self._known_good and not self._is_good(path)]
            if not damaged:
                break
            for path in damaged:
                _quarantine(path)  # it does not count: an older one is kept in its place
        for path in paths:
            if path not in keep:
                # Renamed first: a kill in the middle of the removal must not leave what looks like a damaged one.
                retired = path.rename(hidden(path, RETIRED))
                reached("checkpoint: retired", step=step_of(path))
                shutil.rmtree(retired, ignore_errors=True)

    def _is_good(self, path: Path) -> bool:
        """Whether it is whole; every byte is read, once in the life of this store."""
        try:
            verify_checkpoint(path)
        except ConfigurationError:
            return False
        self._known_good.add(path.name)
        return True


def to_keep(checkpoints: Sequence[tuple[Name, Any, float | None]], keep_last: int, keep_best: int) -> set[Name]:
    """Which to keep of checkpoints given by name, step (oldest first) and score: the newest, and the highest.

    Of equal scores the older: a later one is no better, which early stopping counts, too.
    """
    scored = [(-score, step, name) for name, step, score in checkpoints if score is not None]
    best = sorted(scored, key=lambda one: one[:2])[:keep_best]
    return {*(name for name, _, _ in checkpoints[-keep_last:]), *(name for _, _, name in best)}


def _quarantine(path: Path) -> Path:
    number, quarantined = 1, path.with_name(f"{path.name}.damaged")
    while quarantined.exists():
        number += 1
        quarantined = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(quarantined)
