"""The tracker: what the training loop calls. Every call is cheap, and none raises into the training."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from disttrain.faultpoints import reached
from disttrain.layout import EVALUATION, EXPORTED, JOURNAL, RECIPE
from disttrain.runs.journal import Journal
from disttrain.runs.redact import redact
from disttrain.tracking.handover import Event, Latest, events_done
from disttrain.tracking.mlflow.delivery_state import Backlog, load_state
from disttrain.tracking.mlflow.sender import MlflowSender, backlog_at
from disttrain.tracking.mlflow.server_uri import TrackingSettings, resolve_uri
from disttrain.tracking.source import git_commit

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)


class TrackedRecipe(Protocol):
    """What the tracker reads of a recipe."""

    @property
    def tracking(self) -> TrackingSettings: ...


class Tracker:
    """Writes a job's journal and has MLflow fed from it. For rank 0; that of the other ranks is not enabled.

    One that is not keeps what it was called with last: if rank 0 dies, it can take over, and none of that is lost.

    Args:
        run_dir: the run directory; it exists.
        recipe: its `tracking` section says where MLflow is.
        world_info: facts about this start of the job that become tags: world size, launcher, host.
        enabled: False makes every call do nothing, until it takes over.
        warn: called with messages for the user, from within the tracker's calls; a logger's warnings if None.
        guard: called before each write to the journal, see `Journal`.

    Raises ConfigurationError if `tracking.uri` cannot be one of MLflow's; nothing raises after that.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        recipe: TrackedRecipe,
        world_info: Mapping[str, Any],
        enabled: bool = True,
        warn: Callable[[str], None] | None = None,
        guard: Callable[[], object] = lambda: None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._settings = recipe.tracking
        self._world_info = dict(world_info)
        self._enabled, self._guard = enabled, guard
        self._warn = warn or _logger.warning
        self._journal: Journal | None = None
        self._sender: MlflowSender | None = None
        self._step = 0
        self._troubled = self._is_prepared = False
        self._latest = Latest()
        self._done: set[Event] = set()  # in the journal of a worker that this one has taken over from
        self.uri = resolve_uri(self._settings.uri, self._run_dir) if enabled else None

    @property
    def exports_models(self) -> bool:
        """Whether `model` has anything to do."""
        return self._journal is not None and self._sender is not None and self._settings.log_model

    def start(self, resumed: bool, params: Mapping[str, Any], tags: Mapping[str, Any], step: int = 0) -> None:
        """Open the journal of a job that resumes at `step`, and start the sender.

        `params` may be nested, as a dumped recipe is; names are joined by dots. `tags`, `world_info`, the git commit
        of the current folder and the versions in use become tags.
        """
        if not self._enabled:
            return
        with self._harmless():
            self._step = step
            self._journal = Journal(self._run_dir / JOURNAL, step, self._guard)
            self._journal.event("resume" if resumed else "start", world=self._world_info)
            self._journal.params(dict(_flatten(params)))
            self._journal.tags({**_versions(), **_texts(self._world_info), **_texts(tags)})
            self._journal.append("status", status="RUNNING")
            if (self._run_dir / RECIPE).exists():
                self._journal.artifact(RECIPE)
        self._start_sender()

    def take_over(self, step: int, guard: Callable[[], object]) -> None:
        """Continue, at this step of the job, the journal of a worker that has died, and feed MLflow in its place.

        `guard`: as for a new one. What all ranks have recorded since, and that worker has not, is journalled now.
        """
        self._enabled, self._step, self._guard = True, step, guard
        self.uri = resolve_uri(self._settings.uri, self._run_dir)
        with self._harmless():
            path, first_step = self._run_dir / JOURNAL, self._latest.first_step()
            self._done = events_done(path)
            first_step = step if first_step is None else min(step, first_step)
            self._journal = Journal(path, first_step, guard)
            self._journal.append("status", status="RUNNING")  # the other's sender may have reported that it ended
            for what in self._latest.take():
                if isinstance(what, Event):
                    self.event(what.name, **what.fields)
                else:
                    self.metrics(*what)
        self._start_sender()

    def _start_sender(self) -> None:
        with self._harmless():
            if self.uri is not None and self._journal is not None:
                experiment = self._settings.experiment
                self._sender = MlflowSender(self._run_dir, self.uri, experiment, None, self._warn)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step; those of a step that was recorded before a restart are left out."""
        with self._harmless():
            if self._journal is not None:
                self._step = step
                self._journal.metrics(step, metrics)
            elif not self._enabled:
                self._latest.metrics(step, metrics)
            if self._sender is not None:
                self._sender.poll()

    def event(self, name: str, **fields: Any) -> None:
        """Record that something happened: checkpoint, evaluated, stopped, finished, failed, …"""
        with self._harmless():
            event = Event(name, fields)
            if self._journal is not None and event not in self._done:
                self._journal.event(name, **fields)
            elif not self._enabled:
                self._latest.event(event)

    def restore(self) -> None:
        """Recreate the journal if it was deleted."""
        with self._harmless():
            if self._journal is not None:
                self._journal.restore()

    def artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Have a file in the run directory stored as an artifact, as it is when the sender comes to it.

        Goes to the folder `artifact_path` of the MLflow run, or to the folder it has in the run directory if None.
        """
        with self._harmless():
            if self._journal is not None:
                relative = (self._run_dir.absolute() / path).relative_to(self._run_dir.absolute())
                folder = relative.parent.as_posix() if artifact_path is None else artifact_path
                self._journal.artifact(relative.as_posix(), "" if folder == "." else folder)

    def model(
        self,
        module: nn.Module,
        export: Callable[[nn.Module], tuple[nn.Module, tuple[Any, ...]] | None],
        notes: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Export the trained model into `run_dir/model` and have MLflow store it; see `disttrain.tracking.export`.

        Does nothing if MLflow is off or `tracking.log_model` is false. Takes about a second for a small network.
        """
        from disttrain.tracking.export import export_model

        with self._harmless():
            if self._journal is None or not self.exports_models:
                return
            if self._journal.model_step == self._step and (self._run_dir / EXPORTED).is_dir():
                return  # exported by a start that was interrupted after that
            reason = export_model(self._run_dir / EXPORTED, module, export, notes)
            if reason is not None:
                self._warn(
                    f"the model cannot be exported, so MLflow gets only its weights ({reason}). "
                    "The checkpoints are not affected."
                )
            self._journal.append("model", path=EXPORTED, step=self._step)

    def prepare_model(self) -> None:
        """Import what exporting a model takes, a second's work, once it is known that MLflow takes one; see `model`."""
        with self._harmless():
            # Not before MLflow was reached: until then the sender is as busy, and may be for the same core.
            if self.exports_models and not self._is_prepared and load_state(self._run_dir).run_id:
                from disttrain.tracking.export import warm_up

                self._is_prepared = True
                with suppress(Exception):  # export_model will say it
                    warm_up()

    def conclude(self) -> None:
        """Training has ended: have MLflow sent what there is, and the charts, while the rest is made."""
        with self._harmless():
            if self._journal is not None and self._sender is not None:
                if (self._run_dir / EVALUATION).exists():
                    self._journal.artifact(EVALUATION)
                self._journal.append("charts")
                self._sender.hurry()

    def finish(self, status: str, timeout_s: float = 120.0, unless: Callable[[], bool] | None = None) -> Backlog:
        """Close the journal, let the sender finish, and return what MLflow still lacks; a warning reports it as well.

        Args:
            status: FINISHED, FAILED or KILLED (stopped on request).
            timeout_s: how long to wait for MLflow at most. A server that does not answer is not waited for.
            unless: asked again and again while waiting; True ends the wait.
        """
        with self._harmless():
            if self._journal is not None:
                if (self._run_dir / EVALUATION).exists():
                    self._journal.artifact(EVALUATION)
                self._journal.append("status", status=status)
        with self._harmless():
            if self._journal is not None:
                self._journal.sync()
                self._journal.close()
        self._journal = None
        reached("conclusion: written")
        return self._finish_sender(timeout_s, unless)

    def backlog(self) -> Backlog:
        """What MLflow lacks of a run that was being sent there."""
        return Backlog() if self.uri is None else backlog_at(self._run_dir, self.uri, self._settings.experiment)

    def catch_up(self, timeout_s: float, unless: Callable[[], bool] | None = None) -> Backlog:
        """Upload what MLflow lacks of a run that has ended, as far as it accepts it now; see `finish`."""
        with self._harmless():
            if self.uri is not None:
                self._sender = MlflowSender(self._run_dir, self.uri, self._settings.experiment, None, self._warn)
        return self._finish_sender(timeout_s, unless)

    def _finish_sender(self, timeout_s: float, unless: Callable[[], bool] | None) -> Backlog:
        missing = Backlog()
        with self._harmless():
            if self._sender is not None:
                sender, self._sender = self._sender, None
                missing = sender.finish(timeout_s, unless)
                if missing:
                    self._warn(
                        f"MLflow at {redact(self.uri or '')} still lacks {missing} of this run. Nothing is lost: "
                        f"`{sync_command(self._run_dir)}` uploads the rest, and so does resuming the run."
                    )
        return missing

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn any failure into one warning: no record of a training run is worth losing the run."""
        try:
            yield
        except Exception as error:
            if not self._troubled:
                self._troubled = True
                self._warn(redact(f"{self._run_dir}: tracking failed, training continues: {error}"))


def sync_command(run: str | os.PathLike[str]) -> str:
    """The command that uploads what MLflow lacks of a run, as a shell takes it."""
    return f"disttrain sync {shlex.quote(str(run))}"


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value is not None}


def _versions() -> dict[str, str]:
    from disttrain import __version__

    tags = {"disttrain": __version__, "python": platform.python_version()}
    if "torch" in sys.modules:
        tags["torch"] = str(sys.modules["torch"].__version__)
    commit = git_commit(Path.cwd())
    if commit is not None:
        # The second name is the one that MLflow's own page expects; it takes no suffix.
        tags |= {"git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")}
    return tags
