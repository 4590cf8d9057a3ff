"""`disttrain sync`: what an outage left owing is delivered later, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from disttrain.commands.sync import command
from disttrain.errors import UsageError
from disttrain.tracking import Journal, Tracker, load_state
from tests.disttrain.tracking.conftest import MlflowServer, RecipeMaker


def sync(*arguments: str | Path) -> Result:
    """`disttrain sync` in this process: its failure is the result's exception."""
    return CliRunner().invoke(command, list(map(str, arguments)))


def test_what_is_owed_is_delivered_and_doing_it_twice_changes_nothing(
    server: MlflowServer, run_dir: Path, recipe: RecipeMaker
) -> None:
    from disttrain.recipe import to_toml

    dead = recipe(uri="http://127.0.0.1:9", experiment="sync")
    (run_dir / "recipe.toml").write_text(to_toml(dead))
    warnings: list[str] = []
    tracker = Tracker(run_dir, dead, {}, warn=warnings.append)
    tracker.start(resumed=False, params={"a": 1}, tags={})
    tracker.metrics(1, {"train/loss": 0.5})
    assert tracker.finish("FINISHED", timeout_s=240)
    assert any("disttrain sync" in warning for warning in warnings)
    refused = sync(run_dir, "--timeout", "1", "--json")
    assert "still lacks" in str(refused.exception)
    report = json.loads(refused.stdout)
    assert (report["uri"], report["complete"]) == ("http://127.0.0.1:9", False)
    assert report["missing"]["journal_records"] > 0
    words = [sys.executable, "-m", "disttrain_launch", "sync", str(run_dir), "--uri", server.uri]
    done = subprocess.run(words, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    assert "has everything" in done.stdout
    again = sync(run_dir, "--uri", server.uri, "--json")
    assert json.loads(again.stdout)["complete"] is True

    import mlflow

    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("sync")
    (run,) = client.search_runs([experiment.experiment_id])
    assert json.loads(again.stdout)["mlflow_run_id"] == run.info.run_id
    assert [(row.step, row.value) for row in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 0.5)]


def test_it_says_why_it_failed(server: MlflowServer, run_dir: Path, recipe: RecipeMaker) -> None:
    import mlflow

    from disttrain.recipe import to_toml

    client = mlflow.MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    (run_dir / "recipe.toml").write_text(to_toml(recipe(uri=server.uri, experiment="gone")))
    Journal(run_dir / "journal.jsonl").close()
    done = sync(run_dir, "--uri", server.uri, "--timeout", "240")
    assert str(done.exception) == (
        f"MLflow at {server.uri} still lacks 1 journal record of {run_dir}: the experiment 'gone' is deleted; restore "
        "it or set tracking.experiment. Run it again once that is fixed."
    )


def test_the_server_of_the_environment_is_remembered(
    run_dir: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was told of its server by a variable that is gone when the outage is over; its password is not kept."""
    from disttrain.recipe import to_toml

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    settings = recipe(uri=None)
    (run_dir / "recipe.toml").write_text(to_toml(settings))
    tracker = Tracker(run_dir, settings, {}, warn=lambda message: None)
    tracker.start(resumed=False, params={}, tags={})
    assert tracker.finish("FINISHED", timeout_s=240)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    refused = sync(run_dir, "--timeout", "1")
    assert str(refused.exception).startswith("MLflow at http://127.0.0.1:9 still lacks")
    assert not any("secret" in path.read_text() for path in run_dir.iterdir() if path.is_file())
    assert not (run_dir.parent / "mlflow.db").exists()


@pytest.mark.parametrize(("content", "message"), [("", "not a run directory"), ("none", "no server to upload to")])
def test_a_run_that_cannot_be_delivered_says_why(tmp_path: Path, content: str, message: str) -> None:
    if content:
        (tmp_path / "recipe.toml").write_text('[tracking]\nuri = "none"\n')
        (tmp_path / "journal.jsonl").write_text("")
    done = sync(tmp_path)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


def test_the_server_is_known_before_the_sender_has_begun(
    run_dir: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may be killed in the seconds that its sender takes to start."""
    monkeypatch.setattr("disttrain.tracking.mlflow.sender._START", "pass")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    tracker = Tracker(run_dir, recipe(uri=None), {}, warn=lambda message: None)
    tracker.start(resumed=False, params={}, tags={})
    assert load_state(run_dir).uri == "http://127.0.0.1:9"
    tracker.finish("KILLED", timeout_s=1)
