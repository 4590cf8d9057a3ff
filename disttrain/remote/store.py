"""Checkpoints that are written here and uploaded to a URL, by one machine or by several that share no folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from disttrain.checkpoint import CheckpointStore
from disttrain.errors import ConfigurationError
from disttrain.layout import CHECKPOINTS, Best
from disttrain.remote.mirror import Mirror
from disttrain.remote.place import RemoteRun


class MirroredStore(CheckpointStore):
    """A store whose checkpoints are uploaded to a URL once they are written."""

    def __init__(self, mirror: Mirror, *, keep_last: int, keep_best: int) -> None:
        super().__init__(mirror.folder / CHECKPOINTS, keep_last=keep_last, keep_best=keep_best)
        self.mirror = mirror
        mirror.keep_last, mirror.keep_best = keep_last, keep_best

    def rank_by(self, best: Best) -> None:
        """As CheckpointStore's, at the URL, too."""
        super().rank_by(best)
        self.mirror.best = best

    def commit(self, state: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]) -> Path:
        """As CheckpointStore's; the upload is not waited for."""
        path = super().commit(state, write)
        self.mirror.bring()
        return path

    def settle(self, patience_s: float) -> Iterator[bool]:
        """As the mirror's: until the checkpoints are at the URL."""
        return self.mirror.settle(patience_s)


class Brought:
    """What ranks on other machines than rank 0's bring to the URL themselves: see `checkpoint.shards.Elsewhere`."""

    def __init__(self, url: str, store: CheckpointStore) -> None:
        """`store` is rank 0's MirroredStore, or any on the other ranks."""
        self._url = url
        self._mirror = store.mirror if isinstance(store, MirroredStore) else None

    def can_write(self, probe: str) -> bool:
        """As `checkpoint.shards.Elsewhere` has it: this machine may lack the credentials, or a package."""
        try:
            RemoteRun(self._url).probe(probe)
        except (OSError, ConfigurationError):
            return False
        return True

    def reserve(self, checkpoint: str) -> str:
        """As the mirror's; for rank 0."""
        assert self._mirror is not None
        return self._mirror.reserve(checkpoint)

    def release(self, name: str) -> None:
        """As the mirror's; for rank 0."""
        assert self._mirror is not None
        self._mirror.release(name)

    def put(self, file: Path, name: str, is_alive: Callable[[], None]) -> None:
        """As `RemoteRun.put`."""
        RemoteRun(self._url).put(file, name, is_alive)
