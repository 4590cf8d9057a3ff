from __future__ import annotations

import os
from pathlib import Path

import pytest

from disttrain.errors import ConfigurationError, ExitCode
from disttrain.tracking import how_to_open, resolve_uri


def test_recipe_then_environment_then_a_database_beside_the_runs(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = f"sqlite:///{run_dir.parent}/mlflow.db"
    assert resolve_uri(None, run_dir) == database
    assert resolve_uri("none", run_dir) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri(None, run_dir) == "http://host:5000"
    assert resolve_uri("https://other", run_dir) == "https://other"
    assert resolve_uri("none", run_dir) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert resolve_uri(None, run_dir) is None


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "mlruns"])
def test_stores_of_files_are_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^tracking.uri is .* give a server") as caught:
        resolve_uri(uri, run_dir)
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigurationError, match=r"^MLFLOW_TRACKING_URI is "):
        resolve_uri(None, run_dir)


@pytest.mark.parametrize("name", ["a b", "a#b", "a%20b", "a?b=c&d", "ünï", "-x", "50%"])
def test_the_database_is_where_the_runs_are_whatever_their_folder_is_called(tmp_path: Path, name: str) -> None:
    from sqlalchemy import make_url

    uri = resolve_uri(None, tmp_path / name / "run")
    assert uri is not None
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")


def test_a_folder_that_mlflow_cannot_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    for uri in (None, "sqlite:////tmp/mlflow.db"):
        with pytest.raises(ConfigurationError, match="is not UTF-8, and MLflow cannot keep a run's files there"):
            resolve_uri(uri, folder / "run")
    assert resolve_uri(None, folder) == f"sqlite:///{tmp_path}/mlflow.db"  # the run's own name is another matter
    assert resolve_uri("http://host:5000", folder / "run") == "http://host:5000"


def test_how_to_open() -> None:
    page = "/#/experiments/3/runs/abc?workflowType=machine_learning"
    assert how_to_open("http://a:b@host:5000/", "3", "abc") == [f"http://***@host:5000{page}"]
    assert how_to_open("sqlite:////runs/mlflow.db", "3", "abc") == [
        "mlflow server --backend-store-uri sqlite:////runs/mlflow.db",
        f"http://127.0.0.1:5000{page}",
    ]
    assert how_to_open("http://host:5000") == ["http://host:5000"]  # nothing has arrived there yet
