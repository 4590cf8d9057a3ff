"""Files, charts and the model on their way to MLflow. Runs in the sender's own process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

MODEL_PLACE = "model"


def upload(
    client: MlflowClient,
    run_dir: Path,
    run_id: str,
    record: Mapping[str, Any],
    files: Mapping[str, str],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Bring what an `artifact`, `model` or `charts` record names to the run `run_id`.

    `files` tells what MLflow has already, as SHA-256 by place; returned is what it has now besides. Raises whatever
    MLflow raises, for a later attempt.
    """
    kind = record.get("kind")
    if kind == "charts":
        return _upload_charts(client, run_dir, run_id, files, say)
    path = _inside(run_dir, str(record.get("path", "")))
    if path is None or not path.exists():
        say(f"{record.get('path')} is not in {run_dir} any more and was not sent to MLflow")
        return {}
    if kind == "model":
        return _upload_model(client, path, run_id, files, int(record.get("step", 0)))
    return _upload_file(client, path, run_id, str(record.get("artifact_path", "")), files)


def _upload_file(
    client: MlflowClient, path: Path, run_id: str, artifact_path: str, files: Mapping[str, str]
) -> dict[str, str]:
    place = f"{artifact_path}/{path.name}".lstrip("/")
    digest = _sha256(path)
    if files.get(place) == digest:
        return {}
    client.log_artifact(run_id, str(path), artifact_path or None)
    return {place: digest}


def _upload_charts(
    client: MlflowClient, run_dir: Path, run_id: str, files: Mapping[str, str], say: Callable[[str], None]
) -> dict[str, str]:
    from disttrain.tracking.charts import draw_charts

    try:
        charts = draw_charts(run_dir)
    except Exception as error:  # matplotlib may be missing, evaluation.json may be anything
        say(f"the charts of {run_dir} could not be drawn: {error}")
        return {}
    sent: dict[str, str] = {}
    for chart in charts:
        sent |= _upload_file(client, chart, run_id, "charts", files)
    return sent


def _upload_model(
    client: MlflowClient, folder: Path, run_id: str, files: Mapping[str, str], step: int
) -> dict[str, str]:
    from disttrain.tracking.model import EXPORT_FILE, WEIGHTS_FILE

    exported = folder / EXPORT_FILE
    if not exported.exists():  # a module that cannot be exported: its weights at least
        return _upload_file(client, folder / WEIGHTS_FILE, run_id, MODEL_PLACE, files)
    digest = _sha256(exported)
    if files.get(MODEL_PLACE) != digest:
        from disttrain.tracking.mlflow_model import log_exported_model

        log_exported_model(client, run_id, folder, digest, step)
    return {MODEL_PLACE: digest}


def _inside(folder: Path, name: str) -> Path | None:
    """`name` within `folder`, or None if it leads out of it: a journal may come from anywhere."""
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
