"""Files, charts and the model on their way to MLflow. Runs in the sender's own process.

A run directory may come from anywhere. So what is sent is a regular file in it, reached through no link; it is copied
once it is open, and the copy is sent as it is: nothing is loaded, and nothing can be put in its place meanwhile.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow.tracking import MlflowClient

from disttrain.files import open_to_read, path_inside
from disttrain.layout import CHARTS, MODEL
from disttrain.recipe import is_beside, is_named_by_user
from disttrain.tracking.export import DESCRIPTION_FILE, EXPORT_FILE
from disttrain.tracking.mlflow.outage import OutageError

ARTIFACTS = "mlartifacts"
"""The folder beside the runs for the files of a database that is there, too."""
MODEL_PLACE = "model"


def upload(
    client: MlflowClient,
    run_dir: Path,
    run_id: str,
    record: Mapping[str, Any],
    files: Mapping[str, str],
    say: Callable[[str], None],
    draw: Callable[[], list[Path]] | None = None,
) -> dict[str, str]:
    """Upload what an `artifact`, `model` or `charts` record names to the run `run_id`.

    `files` is what MLflow has already, as SHA-256 by place; what it has gained is returned. `draw` draws the
    charts, `draw_charts` if None. Raises whatever MLflow raises, for a later attempt.
    """
    kind = record.get("kind")
    if kind == "charts":
        return _upload_charts(client, run_dir, run_id, files, say, draw)
    name, folder = str(record.get("path", "")), str(record.get("artifact_path", ""))
    try:
        if not _is_below(folder):
            raise _NotSentError(f"{name} is to go to {folder!r}, which is not a folder of an MLflow run,")
        if kind == "model":
            return _upload_model(client, run_dir, name, run_id, files, _step(record.get("step")))
        return _upload_file(client, run_dir, name, run_id, folder, files)
    except _NotSentError as error:
        say(f"{error} and was not sent to MLflow")
        return {}


def refuse_places_elsewhere(client: MlflowClient, uri: str, run_dir: Path, run_id: str) -> None:
    """Raise OutageError if the database beside the run, which may be a stranger's as well, has files put elsewhere.

    MLflow's client writes them to whatever folder the database names.
    """
    if not is_beside(uri, run_dir) or is_named_by_user(uri):
        return
    info = client.get_run(run_id).info
    ours, of_all = run_dir.parent / ARTIFACTS, client.get_experiment(info.experiment_id).artifact_location
    for place in (info.artifact_uri, of_all, f"{of_all}/models"):
        folder = _local_folder(place)
        of_default = Path("mlruns")  # where MLflow itself puts the files of the experiment "Default"
        if folder is None or not any(folder.resolve().is_relative_to(root.resolve()) for root in (ours, of_default)):
            raise OutageError(
                f"the database has files stored in {place}, not in {ours}; if that is right, set MLFLOW_TRACKING_URI "
                "to the database"
            )
    there = _local_folder(info.artifact_uri)
    link = next((path for path in there.rglob("*") if path.is_symlink()), None) if there is not None else None
    if link is not None:
        raise OutageError(f"{link} is a symbolic link, and files are stored through none; remove it")


def _local_folder(place: str) -> Path | None:
    """What MLflow's client takes `place` for; None if that is not a local folder."""
    parts = urlsplit(place)
    if parts.scheme not in ("", "file") or parts.netloc or parts.query or parts.fragment:
        return None
    return Path(url2pathname(parts.path) if parts.scheme else place)


class _NotSentError(Exception):
    """What a record names is not a file of the run; the message says what it is instead."""


@contextmanager
def _copies(run_dir: Path, *names: str) -> Iterator[tuple[list[Path], str]]:
    """Copies of files of the run, in a folder of their own while the block runs, and the SHA-256 of the first.

    Raises _NotSentError, OSError if there is no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        copies = []
        for name in names:
            path = path_inside(run_dir, name)
            if path is None:
                raise _NotSentError(f"{name} leads out of {run_dir}")
            try:
                file = open_to_read(path)
            except OSError as error:
                is_gone = isinstance(error, FileNotFoundError)
                what = "is not there any more" if is_gone else f"cannot be read ({error.strerror})"
                raise _NotSentError(f"{name} in {run_dir} {what}") from error
            copies.append(Path(folder) / path.name)
            with file, copies[-1].open("xb") as copy:
                shutil.copyfileobj(file, copy)
        with copies[0].open("rb") as first:
            digest = hashlib.file_digest(first, "sha256").hexdigest()
        yield copies, digest


def _upload_file(
    client: MlflowClient, run_dir: Path, name: str, run_id: str, artifact_path: str, files: Mapping[str, str]
) -> dict[str, str]:
    with _copies(run_dir, name) as ((copy,), digest):
        place = f"{artifact_path}/{copy.name}".lstrip("/")
        if files.get(place) == digest:
            return {}
        client.log_artifact(run_id, str(copy), artifact_path or None)
        return {place: digest}


def _upload_charts(
    client: MlflowClient,
    run_dir: Path,
    run_id: str,
    files: Mapping[str, str],
    say: Callable[[str], None],
    draw: Callable[[], list[Path]] | None,
) -> dict[str, str]:
    from disttrain.tracking.charts import draw_charts

    try:
        charts = draw_charts(run_dir) if draw is None else draw()
    except Exception as error:  # matplotlib may be missing, evaluation.json may be anything
        say(f"the charts of {run_dir} could not be drawn: {error}")
        return {}
    sent: dict[str, str] = {}
    for chart in charts:
        sent |= _upload_file(client, run_dir, chart.relative_to(run_dir).as_posix(), run_id, CHARTS, files)
    return sent


def _upload_model(
    client: MlflowClient, run_dir: Path, folder: str, run_id: str, files: Mapping[str, str], step: int
) -> dict[str, str]:
    path = path_inside(run_dir, f"{folder}/{EXPORT_FILE}")
    if path is not None and not path.exists():  # a module that cannot be exported: its weights at least
        return _upload_file(client, run_dir, f"{folder}/{MODEL}", run_id, MODEL_PLACE, files)
    with _copies(run_dir, f"{folder}/{EXPORT_FILE}", f"{folder}/{DESCRIPTION_FILE}") as ((exported, about), digest):
        if files.get(MODEL_PLACE) != digest:
            from disttrain.tracking.mlflow.model import log_exported_model, read_description

            try:
                description = read_description(about)
            except ValueError as error:
                raise _NotSentError(f"{folder}/{EXPORT_FILE} in {run_dir} cannot be described ({error})") from error
            log_exported_model(client, run_id, exported, description, digest, step)
        return {MODEL_PLACE: digest}


def _is_below(folder: str) -> bool:
    """Whether an artifact's folder is below the run's: MLflow refuses others, each time."""
    return not folder.startswith("/") and ".." not in folder.split("/") and "\\" not in folder and "\0" not in folder


def _step(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0
