"""What `disttrain doctor` does to a real MLflow server: it may write there, and leaves no run behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from disttrain.doctor import Finding, Question
from disttrain.doctor.server import tracking
from tests.disttrain.tracking.conftest import MlflowServer


def test_it_writes_and_leaves_nothing_to_be_seen(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    client = MlflowClient(server.uri)
    before = [experiment.name for experiment in client.search_experiments()]

    def found(experiment: str) -> Finding:
        question = Question(str(tmp_path), "digits", (f"tracking.experiment={experiment}",))
        finding, clock = tracking(question)
        assert (clock.name, clock.status) == ("server-clock", "ok")
        return finding

    assert found("of-the-doctor") == Finding("tracking", "ok", f"{server.uri} accepts new experiments")
    assert [experiment.name for experiment in client.search_experiments()] == before
    number = client.create_experiment("of-the-doctor")
    assert found("of-the-doctor").detail == f"{server.uri} lets the experiment 'of-the-doctor' be written"
    assert client.search_runs([number]) == []
    client.delete_experiment(number)
