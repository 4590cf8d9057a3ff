"""Where MLflow is."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Protocol

from disttrain.errors import ConfigurationError
from disttrain.layout import DATABASE
from disttrain.recipe.address import is_text
from disttrain.runs.redact import redact

NO_MLFLOW = "none"
_OWN_SERVER = "http://127.0.0.1:5000"  # where `mlflow server` listens by itself


class TrackingSettings(Protocol):
    """The recipe's `tracking` section."""

    @property
    def uri(self) -> str | None: ...
    @property
    def experiment(self) -> str: ...
    @property
    def log_model(self) -> bool: ...


def resolve_uri(uri: str | None, run_dir: str | os.PathLike[str]) -> str | None:
    """The MLflow server or database for a run directory, or None if MLflow is switched off.

    Args:
        uri: `tracking.uri` of the recipe: a URI, "none" for the journal alone, or None for MLFLOW_TRACKING_URI, and
            where that is not set for a database beside the runs.
        run_dir: the run directory.

    Raises ConfigurationError for a folder, since MLflow no longer supports file stores, and for a database in
    a folder whose name MLflow cannot handle.
    """
    source = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri == NO_MLFLOW:
        return None
    if uri is not None:
        if uri.startswith("file:") or (":" not in uri and uri != "databricks"):
            raise ConfigurationError(
                f"{source} is {redact(uri)!r}, and MLflow no longer keeps runs in plain folders; "
                f"give a server (http://host:5000), a database (sqlite:////folder/{DATABASE}), or none"
            )
        if not uri.startswith(("http://", "https://", "databricks")):
            _refuse_undecodable(Path(run_dir).absolute().parent)  # the files that MLflow is given are kept there
        return uri
    return _database(Path(run_dir).absolute().parent / DATABASE)


def _database(path: Path) -> str:
    """The URI of a database file, as the installed SQLAlchemy reads it: versions differ in whether they unquote."""
    _refuse_undecodable(path.parent)
    plain = f"sqlite:///{path.as_posix()}"
    if "%" not in plain and "?" not in plain:  # else left as it is: mlflow.json identifies runs by it
        return plain
    from sqlalchemy import URL, make_url

    uri = URL.create("sqlite", database=path.as_posix()).render_as_string(hide_password=False)
    if make_url(uri).database != path.as_posix():
        raise ConfigurationError(
            f"{path.parent}: the installed SQLAlchemy cannot open a database in a folder of that name; give a "
            "--run-dir elsewhere, or tracking.uri"
        )
    return uri


def _refuse_undecodable(folder: Path) -> None:
    if not is_text(str(folder)):
        raise ConfigurationError(
            f"{folder}: a name in it is not UTF-8, and MLflow cannot keep a run's files there; give a --run-dir "
            "elsewhere, or a server as tracking.uri, or none"
        )


def how_to_open(uri: str, experiment_id: str = "", run_id: str = "") -> list[str]:
    """How a user gets to see a run at `uri`: the address of its page, after the command that serves a database.

    Without ids the page is that of all runs.
    """
    uri = redact(uri)
    is_server = uri.startswith(("http://", "https://"))
    page = uri.rstrip("/") if is_server else _OWN_SERVER
    if run_id:
        # MLflow's pages are of two kinds, and without the last word it takes an experiment to be about language models.
        page += f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    return [page] if is_server else [f"mlflow server --backend-store-uri {shlex.quote(uri)}", page]
