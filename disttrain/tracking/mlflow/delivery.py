"""Uploading a run's journal to MLflow. Runs in the sender's own process, never in a training process.

Delivery is idempotent, so it may be cut off anywhere and repeated: the same metric row sent twice is one row in
MLflow, parameters and tags are set to the same value, a file is uploaded again only if its content is another. The
offset in `mlflow.json` moves on after MLflow has answered; a death between the two repeats a few rows, no more.
"""

from __future__ import annotations

import contextlib
import getpass
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from disttrain.layout import JOURNAL
from disttrain.runs.journal import read_journal, read_records
from disttrain.runs.redact import redact
from disttrain.tracking.mlflow.database import is_database, one_at_a_time
from disttrain.tracking.mlflow.delivery_state import state_for
from disttrain.tracking.mlflow.limits import (
    LONG_VALUE,
    MAX_METRICS,
    MAX_PARAMS,
    MAX_TAGS,
    MAX_VALUE,
    metric_key,
    shorten,
)
from disttrain.tracking.mlflow.outage import OutageError, brief
from disttrain.tracking.mlflow.uploads import ARTIFACTS, refuse_places_elsewhere, upload

JOB_TAG = "disttrain.training.job"
_CHUNK_RECORDS = 2000
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}
_STATUSES = {"RUNNING", "FINISHED", "FAILED", "KILLED"}
_GONE = {"RESOURCE_DOES_NOT_EXIST"}

Entity = Metric | Param | RunTag


class Delivery:
    """Delivers one run directory to one MLflow server or database.

    Args:
        run_dir: holds the journal and `mlflow.json`.
        uri: of the server or database, without credentials where the scheme allows it.
        experiment: name, created if need be.
        run_name: what a new run is called.
        say: called with a message for the user, at most once per kind of problem.
        draw: draws the charts, and gives their files; `draw_charts` if None.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        experiment: str,
        run_name: str,
        say: Callable[[str], None],
        draw: Callable[[], list[Path]] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._say = say
        self._draw = draw
        self._said: set[str] = set()
        self._client: MlflowClient | None = None
        self._params: dict[str, str] = {}
        self._seems_running = self._draws_last = False
        self._state = state_for(run_dir, redact(uri), experiment)

    @property
    def offset(self) -> int:
        """How many bytes of the journal MLflow has."""
        return self._state.offset

    def deliver(self, *, charts: bool = True) -> None:
        """Send what the journal holds by now, and `charts`. Raises OutageError; what was sent until then counts."""
        journal = self.run_dir / JOURNAL
        try:
            size = journal.stat().st_size
        except FileNotFoundError:
            if self._state.offset:
                self._say_once(
                    "gone",
                    f"{journal} is gone: if the run was moved or deleted, MLflow gets nothing more "
                    "until the next checkpoint recreates it.",
                )
            return
        self._said.discard("gone")
        if size < self._state.offset:  # the journal was truncated: what MLflow receives twice, it keeps once
            self._state.offset = 0
        if size == self._state.offset and not self._state.uploads and self._state.status is None:
            return
        try:
            client = self._connect()
            while chunk := list(islice(read_records(journal, self._state.offset), _CHUNK_RECORDS)):
                self._deliver_chunk(client, [record for record, _ in chunk if record is not None])
                self._state.offset = chunk[-1][1]
                self._state.save(self.run_dir)
            if self._state.status is not None and self._state.status.get("status") != "FINISHED":
                self._send_status(client)  # a stop leaves seconds: the charts, which take some, can wait for a resume
            try:
                self._upload(client, charts=charts)
            finally:
                self._send_status(client)
        except OutageError:
            raise
        except Exception as error:
            # Whatever MLflow, its database driver or its network library raises: later may be better, never is worse.
            self._client = None
            raise OutageError(brief(error)) from error

    def mark_killed(self) -> None:
        """Mark the run as failed in MLflow once the training process has died; it would seem to be running."""
        if self._client is not None and self._seems_running:
            self._client.set_terminated(self._state.run_id, "KILLED")

    def _connect(self) -> MlflowClient:
        if self._client is None:
            with one_at_a_time(self.uri):
                client = MlflowClient(self.uri)
                run = self._find_run(client)
            self._params = dict(run.data.params)
            self._client = client
        return self._client

    def _find_run(self, client: MlflowClient) -> Run:
        """The job's run: the one of `mlflow.json`, else the one with the job's tag, else a new one."""
        if self._state.run_id:
            try:
                run = client.get_run(self._state.run_id)
            except MlflowException as error:
                if error.error_code not in _GONE:
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        experiment_id = self._find_experiment(client)
        job = next((record.get("job") for record in read_journal(self.run_dir / JOURNAL)), None) or self._run_name
        # A run may exist although mlflow.json has no record of it: we may have been killed between the two.
        tag = str(job).replace("'", "")
        runs = client.search_runs([experiment_id], f"tags.`{JOB_TAG}` = '{tag}'", max_results=1)
        run = runs[0] if runs else self._create_run(client, experiment_id, str(job))
        self._state = type(self._state)(
            uri=redact(self.uri), experiment=self._experiment, experiment_id=experiment_id, run_id=run.info.run_id
        )
        self._state.save(self.run_dir)
        return run

    def _create_run(self, client: MlflowClient, experiment_id: str, job: str) -> Run:
        tags = {JOB_TAG: job, "mlflow.source.name": "disttrain", "mlflow.source.type": "LOCAL"}
        with contextlib.suppress(OSError, KeyError, ImportError):  # a container may run under a number without a name
            tags["mlflow.user"] = getpass.getuser()
        first = next(read_journal(self.run_dir / JOURNAL), {})
        start = _milliseconds(first.get("time"))
        return client.create_run(
            experiment_id, start_time=start, tags=tags, run_name=shorten(self._run_name, MAX_VALUE)
        )

    def _find_experiment(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            artifacts = self._artifact_location()
            try:
                return str(client.create_experiment(self._experiment, artifact_location=artifacts))
            except MlflowException:  # another job may have been faster
                experiment = client.get_experiment_by_name(self._experiment)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise OutageError(f"the experiment {self._experiment!r} is deleted; restore it or set tracking.experiment")
        return str(experiment.experiment_id)

    def _artifact_location(self) -> str | None:
        """For a database: a folder beside the runs. MLflow's own default is the current folder. A server decides."""
        if not is_database(self.uri):
            return None
        return (self.run_dir.parent / ARTIFACTS).absolute().as_uri()

    def _deliver_chunk(self, client: MlflowClient, records: Sequence[dict[str, Any]]) -> None:
        entities: list[Entity] = []
        for record in records:
            match record:  # events stay in the journal
                case {"kind": "metrics", "step": int(step), "metrics": dict(metrics)}:
                    self._draws_last = False
                    when = _milliseconds(record.get("time"))
                    entities += [Metric(metric_key(key), value, when, step) for key, value in metrics.items()]
                case {"kind": "params", "params": dict(params)}:
                    entities += self._param_entities(params)
                case {"kind": "tags", "tags": dict(tags)}:
                    entities += [RunTag(metric_key(key), shorten(value, MAX_VALUE)) for key, value in tags.items()]
                case {"kind": "artifact" | "model", "path": str()}:
                    if record not in self._state.uploads:
                        self._state.uploads.append(record)
                case {"kind": "status", "status": str(status)} if status in _STATUSES:
                    self._state.status = {"status": status, "time": record.get("time")}
                    if status != "RUNNING" and not self._draws_last:
                        self._ask_for_charts()
                case {"kind": "charts"}:
                    self._draws_last = True  # of all metrics there are, unless more of them come
                    self._ask_for_charts()
        for kind, limit in ((Param, MAX_PARAMS), (RunTag, MAX_TAGS), (Metric, MAX_METRICS)):
            batch = [entity for entity in entities if isinstance(entity, kind)]
            for begin in range(0, len(batch), limit):
                self._log(client, batch[begin : begin + limit])

    def _ask_for_charts(self) -> None:
        charts = {"kind": "charts"}
        self._state.uploads = [*(u for u in self._state.uploads if u != charts), charts]

    def _param_entities(self, params: dict[str, Any]) -> list[Entity]:
        """MLflow never changes a parameter: what a restart changed becomes a tag. What is not set is left out."""
        entities: list[Entity] = []
        for name, value in params.items():
            key, text = metric_key(name), shorten(value, LONG_VALUE)
            if value is None and key not in self._params:
                continue
            if self._params.setdefault(key, text) == text:
                entities.append(Param(key, text))
            else:
                entities.append(RunTag(f"resumed.{key}", shorten(value, MAX_VALUE)))
        return entities

    def _log(self, client: MlflowClient, entities: Sequence[Entity]) -> None:
        """Send entities. One that MLflow refuses for good must not hold up the others."""
        try:
            client.log_batch(
                self._state.run_id,
                metrics=[entity for entity in entities if isinstance(entity, Metric)],
                params=[entity for entity in entities if isinstance(entity, Param)],
                tags=[entity for entity in entities if isinstance(entity, RunTag)],
            )
        except MlflowException as error:
            if error.error_code in _GONE or (error.error_code in _REFUSED and self._is_deleted(client)):
                self._client = None
                self._state.offset = 0
                raise OutageError("the run was deleted there; a new one will be made") from error
            if error.error_code not in _REFUSED:
                raise
            if len(entities) > 1:
                middle = len(entities) // 2
                self._log(client, entities[:middle])
                self._log(client, entities[middle:])
            elif isinstance(entity := entities[0], Param) and len(entity.value) > 500:
                self._log(client, [Param(entity.key, shorten(entity.value, 500))])  # the limit of older servers
            else:
                self._say_once(entity.key, f"MLflow refused {entity.key!r}: {brief(error)}; the journal has it")

    def _is_deleted(self, client: MlflowClient) -> bool:
        return bool(client.get_run(self._state.run_id).info.lifecycle_stage != "active")

    def _upload(self, client: MlflowClient, *, charts: bool) -> None:
        """Upload what waits for it. A failure holds up neither the metrics nor the other files."""
        if self._state.uploads:
            refuse_places_elsewhere(client, self.uri, self.run_dir, self._state.run_id)
        failed: Exception | None = None
        last = [record for record in self._state.uploads if record.get("kind") == "charts"]
        for record in [record for record in self._state.uploads if record not in last] + last * charts:
            try:
                self._state.files.update(
                    upload(client, self.run_dir, self._state.run_id, record, self._state.files, self._say, self._draw)
                )
            except Exception as error:
                failed = failed or error
                continue
            self._state.uploads.remove(record)
            self._state.save(self.run_dir)
        if failed is not None:
            raise OutageError(f"files cannot be stored: {brief(failed)}") from failed

    def _send_status(self, client: MlflowClient) -> None:
        if self._state.status is not None:
            status, when = self._state.status.get("status", "FINISHED"), self._state.status.get("time")
            if status == "RUNNING":
                client.update_run(self._state.run_id, status="RUNNING")
            else:
                client.set_terminated(self._state.run_id, status, _milliseconds(when))
            self._seems_running = status == "RUNNING"
            self._state.status = None
            self._state.save(self.run_dir)

    def _say_once(self, about: str, message: str) -> None:
        if about not in self._said:
            self._said.add(about)
            self._say(redact(message))


def _milliseconds(seconds: Any) -> int:
    known = isinstance(seconds, (int, float)) and 0 <= seconds < 2**40
    return round((seconds if known else time.time()) * 1000)
