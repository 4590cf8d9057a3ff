"""Uploads what a run's working folder holds to the URL where the run lives, on a thread beside the training."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from disttrain.checkpoint import CheckpointStore
from disttrain.checkpoint.folder import LEAVING, hidden
from disttrain.checkpoint.store import to_keep
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.files import read_bytes, read_text, replace_file
from disttrain.layout import (
    CHARTS,
    CHECKPOINTS,
    DELIVERED,
    EVALUATION,
    EXPORTED,
    JOURNAL,
    LOGS,
    MANIFEST,
    RECIPE,
    SPIKES,
    Best,
    contents_of,
    metrics_of,
)
from disttrain.recipe import recipe_of_checkpoints, to_toml
from disttrain.remote.lease import Lease
from disttrain.remote.place import RemoteRun, as_json, next_revision, step_and_revision

_OWNER = ".remote"  # in the working folder: the id of the lease under which it was worked on last
_AT_THE_END = (LOGS, CHARTS, EXPORTED)
_RETRY_S = 5.0


class Mirror:
    """Keeps the URL's copy of a run. The URL is what counts; the working folder is rebuilt from it on another machine.

    As a context it owns the URL, fetches what is there, and at the end uploads everything and releases it. Whatever
    fails in between is a warning, and is retried with the next checkpoint.
    """

    def __init__(self, run: RemoteRun, folder: Path, warn: Callable[[str], None], lease: Lease | None = None) -> None:
        self.run = run
        self.folder = folder
        self._warn = warn
        self._lease = lease or Lease(run)
        self.keep_last, self.keep_best, self.best = 2, 1, Best()
        self._asked = threading.Condition()
        self._wanted = self._done = 0  # how many uploads of everything were requested, and how many are done
        self._ends = False
        self._error = ""
        self._metrics: dict[str, dict[str, float]] = {}
        self._sent: dict[str, bytes] = {}
        self._journal_there = 0
        # Of checkpoints that several machines bring, until they are over and the thread has seen what became of them.
        self._names = threading.Lock()
        self._reserved: set[str] = set()
        self._released: set[str] = set()
        self._given: dict[str, str] = {}  # what the newest one of each name here is called there
        self._thread = threading.Thread(target=self._serve, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        """Raises ConfigurationError or DisttrainError if the URL cannot be used now."""
        with self.run.opening():
            mark = self.folder / _OWNER
            # The lock on the folder is ours, so the previous worker there has ended.
            last = read_text(mark) if mark.exists() else ""
            self._lease.acquire(dead=last)
            try:
                if last != self._lease.previous or not last or self._lacks_parts():
                    self._fetch()
                replace_file(mark, self._lease.id)
                for name in self.run.checkpoints().unfinished:
                    self.run.remove_checkpoint(name)
            except BaseException:
                self._lease.release()
                raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Upload the rest. For a run that ended well this was waited for; what fails now is a warning."""
        with self._asked:
            self._ends = True
            self._asked.notify_all()
        self._thread.join()
        try:
            if not self._lease.is_ours():
                return
            self._bring_files()
            for name in _AT_THE_END:
                for path in sorted((self.folder / name).rglob("*")):
                    if path.is_file() and not path.is_symlink():
                        self.run.write(path.relative_to(self.folder).as_posix(), read_bytes(path))
            self._lease.release()
        except OSError as failure:
            self._warn(f"the last of the run's files could not be uploaded: {failure}")

    def bring(self) -> None:
        """Have the thread upload what is new. Returns at once."""
        with self._asked:
            self._wanted += 1
            self._asked.notify_all()

    def reserve(self, checkpoint: str) -> str:
        """A name for the checkpoint under which there is none: nothing there is removed until it was released.

        Raises OSError if the URL cannot be reached, or is another job's by now.
        """
        if not self._lease.is_ours():
            raise OSError(f"{self.run.url} was taken over by another job")
        with self._names:  # nothing of that name is being removed
            # No name twice: an earlier one of this step may just be on its way, its manifest last.
            name = next_revision(self._given[checkpoint]) if checkpoint in self._given else checkpoint
            while self.run.manifest(name) is not None:
                name = next_revision(name)
            self._reserved.add(name)
            self._given[checkpoint] = name
        return name

    def release(self, name: str) -> None:
        """What has not come to be a checkpoint under a reserved name may be removed."""
        with self._names:
            self._released.add(name)

    def settle(self, patience_s: float) -> Iterator[bool]:
        """Wait until all that is here is there: false every few seconds, and true in the end.

        Raises DisttrainError, with the last cause, if an attempt fails after more than `patience_s`.
        """
        deadline = time.monotonic() + patience_s
        while True:
            self.bring()
            while True:
                with self._asked:
                    if self._asked.wait_for(lambda: self._done == self._wanted, timeout=_RETRY_S):
                        break
                yield False
            if not self._error:
                yield True
                return
            if time.monotonic() + _RETRY_S > deadline:
                raise DisttrainError(
                    f"{self._error}. The checkpoint is in {self.folder} on this machine; start again there."
                )
            time.sleep(_RETRY_S)
            yield False

    def _serve(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._wanted > self._done or self._ends)
                if self._wanted == self._done:
                    return
                wanted = self._wanted
            error = self._attempt()
            if error and error != self._error:
                self._warn(f"{error}. Training continues, and the next checkpoint retries.")
            with self._asked:
                self._done, self._error = wanted, error
                self._asked.notify_all()

    def _attempt(self) -> str:
        try:
            if not self._lease.is_ours():
                return f"{self.run.url} was taken over by another job, so nothing more is written there"
            self._bring_files()  # first: where a checkpoint is, the journal holds the steps before it
            self._bring_checkpoints()
        except Exception as error:  # whatever it is, the thread that waits for this one must learn of it
            return f"not uploaded: {error}"
        return ""

    def _bring_checkpoints(self) -> None:
        """Put there what is to be kept and is not there, newest first; then remove what is no longer to be kept."""
        with self._names:
            self._reserved -= self._released
            self._released.clear()
        there = self.run.checkpoints()
        known = [(name, step_and_revision(name), self.best.score(self._metrics_of(name))) for name in there.good]
        missing = {}
        for path in CheckpointStore(self.folder / CHECKPOINTS).paths():
            name = self._name_if_missing(path, there.damaged)
            if name is not None:
                missing[name] = path
                known.append((name, step_and_revision(name), self.best.score(metrics_of(path))))
        newest_of_step = {step: name for name, (step, _), _ in sorted(known, key=lambda one: one[1])}
        current = [one for one in sorted(known, key=lambda one: one[1]) if newest_of_step[one[1][0]] == one[0]]
        keep = to_keep(current, self.keep_last, self.keep_best)
        for name in sorted(missing.keys() & keep, key=step_and_revision, reverse=True):
            if not self._put(missing[name], name):
                return  # retired meanwhile: another round is due, and until then nothing is removed
        for name in (*there.good, *there.unfinished):
            with self._names:
                if name not in keep and name not in self._reserved:
                    self.run.remove_checkpoint(name)

    def _name_if_missing(self, path: Path, damaged: list[str]) -> str | None:
        """What a local checkpoint is to be called there; None if it is there, or here no more."""
        if not (path / MANIFEST).exists():
            return None
        manifest, name = read_bytes(path / MANIFEST), path.name
        with self._names:
            given = step_and_revision(self._given.get(path.name, path.name))
        # Not from the given one on: of a save that failed afterwards nothing is here, and the one before it is there.
        while (there := self.run.manifest(name)) is not None or step_and_revision(name) < given:
            if there == manifest and name not in damaged:
                return None
            name = next_revision(name)
        return name

    def _put(self, path: Path, name: str) -> bool:
        aside = hidden(path, LEAVING)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            # Links, so that the files stay while they travel though the checkpoint may be retired.
            shutil.copytree(path, aside, copy_function=os.link)
            self.run.put_checkpoint(aside, name)
        except (FileNotFoundError, shutil.Error):
            if path.exists():
                raise
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._metrics[name] = metrics_of(path)
        return True

    def _metrics_of(self, name: str) -> dict[str, float]:
        if name not in self._metrics:
            self._metrics[name] = self.run.metrics(name)
        return self._metrics[name]

    def _bring_files(self) -> None:
        # What MLflow has of the journal is read before the journal: it must not claim more than that holds.
        files = {name: self.folder / name for name in (DELIVERED, RECIPE, EVALUATION, SPIKES)}
        contents = {name: read_bytes(path) for name, path in files.items() if path.exists()}
        if (self.folder / JOURNAL).exists():
            self._journal_there = self.run.write_journal(self.folder / JOURNAL, self._journal_there)
        for name, content in contents.items():
            if self._sent.get(name) != content:
                self.run.write(name, content)
                self._sent[name] = content

    def _lacks_parts(self) -> bool:
        """Whether a checkpoint here lacks files that other machines have brought to the URL."""
        paths = CheckpointStore(self.folder / CHECKPOINTS).paths()
        manifests = [(path, as_json(read_bytes(path / MANIFEST))) for path in paths if (path / MANIFEST).exists()]
        return any(
            "tensors" in manifest and not all((path / file).exists() for file in contents_of(manifest) or ())
            for path, manifest in manifests
        )

    def _fetch(self) -> None:
        """Rebuild the working folder from what is there."""
        for name in (RECIPE, EVALUATION, SPIKES, DELIVERED, JOURNAL, CHECKPOINTS):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        recipe = self.run.read(RECIPE)
        if recipe is None and not self.run.checkpoints().good:
            return
        replace_file(self.folder / JOURNAL, self.run.read_journal())
        for name in (EVALUATION, SPIKES, DELIVERED):
            content = self.run.read(name)
            if content is not None:
                replace_file(self.folder / name, content)
        self._fetch_newest_checkpoint()
        replace_file(self.folder / RECIPE, recipe or self._restored_recipe())  # last: with it, the folder is a run's

    def _restored_recipe(self) -> str:
        found = recipe_of_checkpoints(self.folder)
        if found is None:
            raise ConfigurationError(
                f"{self.run.url} holds checkpoints but no {RECIPE}, and none of them has the recipe: "
                "choose another --run-dir."
            )
        self._warn(f"{self.run.url}/{RECIPE} is lost; it is restored from {CHECKPOINTS}/{found[0].name}.")
        return to_toml(found[1])

    def _fetch_newest_checkpoint(self) -> None:
        names = self.run.checkpoints().good
        for name in reversed(names):
            try:
                self.run.get_checkpoint(name, self.folder / CHECKPOINTS / name.partition(".")[0])
                return
            except ConfigurationError as error:
                self.run.quarantine(name, str(error))
                others = name != names[0]
                what = "the previous checkpoint is used" if others else "there is no other, so training starts over"
                self._warn(f"{error} Quarantined; {what}.")
