"""Files, charts and the model on their way to MLflow. Runs in the sender's own process."""

from __future__ import annotations

import hashlib
import os
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
    folder = str(record.get("artifact_path", ""))
    if path is None or not (os.path.isdir(path) if kind == "model" else os.path.isfile(path)) or not _is_below(folder):
        say(f"{record.get('path')} is not in {run_dir} any more and was not sent to MLflow")
        return {}
    if kind == "model":
        return _upload_model(client, path, run_id, files, _step(record.get("step")))
    return _upload_file(client, path, run_id, folder, files)


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
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        return None
    return path if path.is_relative_to(folder.resolve()) else None


def _is_below(folder: str) -> bool:
    """Whether an artifact's folder is below the run's: MLflow refuses others, again and again."""
    return not folder.startswith("/") and ".." not in folder.split("/") and "\\" not in folder and "\0" not in folder


def _step(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
