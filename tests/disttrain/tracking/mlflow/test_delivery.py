"""Delivery within the test's own process, against a real server."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from disttrain.runs.journal import Journal, read_journal
from disttrain.tracking import Tracker, backlog_of, load_state, resolve_uri
from disttrain.tracking.mlflow.database import one_at_a_time
from disttrain.tracking.mlflow.delivery import Delivery, OutageError

Rows = dict[str, list[tuple[int, float, int]]]


def delivery(run_dir: Path, uri: str, said: list[str] | None = None) -> Delivery:
    return Delivery(run_dir, uri, "tests", run_dir.name, [].append if said is None else said.append)


def the_run(uri: str, run_dir: Path) -> Run:
    return MlflowClient(uri).get_run(load_state(run_dir).run_id)


def rows_in_mlflow(uri: str, run_dir: Path) -> Rows:
    client, run = MlflowClient(uri), the_run(uri, run_dir)
    return {
        name: sorted((row.step, row.value, row.timestamp) for row in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }


def rows_in_journal(run_dir: Path) -> Rows:
    rows: Rows = {}
    for record in read_journal(run_dir / "journal.jsonl"):
        if record["kind"] == "metrics":
            for name, value in record["metrics"].items():
                rows.setdefault(name, []).append((record["step"], value, round(record["time"] * 1000)))
    return {name: sorted(values) for name, values in rows.items()}


@pytest.fixture
def journal(run_dir: Path) -> Journal:
    return Journal(run_dir / "journal.jsonl")


def test_everything_arrives(server: Any, run_dir: Path, journal: Journal) -> None:
    journal.params({f"param.{i}": i for i in range(150)})
    journal.params({"long": "x" * 20_000, "odd name!": 1, "unset": None})
    journal.tags({"launcher": "torchrun", "essay": "y" * 20_000})
    for step in range(700):
        journal.metrics(step, {"train/loss": 1 / (step + 1), "train/top@5": 0.5, "system/node-0/cpu_percent": 99.0})
    journal.append("status", status="FINISHED")
    delivery(run_dir, server.uri).deliver()
    run = the_run(server.uri, run_dir)
    assert run.data.params["param.149"] == "149"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["odd name_"] == "1"
    assert "unset" not in run.data.params
    assert run.data.tags["launcher"] == "torchrun"
    assert run.data.tags["essay"].startswith("yyy")
    assert (run.info.run_name, run.info.status) == (run_dir.name, "FINISHED")
    sent, kept = rows_in_mlflow(server.uri, run_dir), rows_in_journal(run_dir)
    kept["train/top_5"] = kept.pop("train/top@5")
    assert sent == kept
    assert not backlog_of(run_dir)


def test_values_that_are_not_numbers_arrive(server: Any, run_dir: Path, journal: Journal) -> None:
    journal.metrics(1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "fine": 1.0})
    delivery(run_dir, server.uri).deliver()
    metrics = the_run(server.uri, run_dir).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] > 1e300
    assert metrics["minus"] < -1e300
    assert metrics["fine"] == 1.0


def test_a_kill_between_delivery_and_its_note_repeats_nothing(server: Any, run_dir: Path, journal: Journal) -> None:
    """The worst case: everything was sent again and again, and nothing was noted, not even the run."""
    (run_dir / "recipe.toml").write_text("a = 1\n")
    journal.params({"lr": 0.1})
    journal.artifact("recipe.toml")
    journal.metrics(1, {"train/loss": 1.0})
    journal.metrics(2, {"train/loss": 0.5})
    delivery(run_dir, server.uri).deliver()
    first = load_state(run_dir)
    for forgotten in ({"offset": 0}, {"offset": 0, "files": {}}, None):
        if forgotten is None:
            (run_dir / "mlflow.json").unlink()
        else:
            stored = json.loads((run_dir / "mlflow.json").read_text())
            (run_dir / "mlflow.json").write_text(json.dumps({**stored, **forgotten}))
        journal.metrics(3, {"train/loss": 0.25})
        delivery(run_dir, server.uri).deliver()
        assert load_state(run_dir) == load_state(run_dir)
        assert load_state(run_dir).run_id == first.run_id
        assert rows_in_mlflow(server.uri, run_dir) == rows_in_journal(run_dir)
    artifacts = MlflowClient(server.uri).list_artifacts(first.run_id)
    assert [file.path for file in artifacts] == ["recipe.toml"]


def test_cut_in_the_middle_everything_arrives_once(line: Any, run_dir: Path, journal: Journal) -> None:
    sender = delivery(run_dir, line.uri)
    journal.metrics(1, {"train/loss": 1.0})
    with pytest.raises(OutageError):
        sender.deliver()
    line.connect()
    sender.deliver()
    for step in range(2, 2500):
        journal.metrics(step, {"train/loss": 1 / step, "train/lr": 0.1})
    line.cut()
    for _ in range(2):
        with pytest.raises(OutageError) as caught:
            sender.deliver()
        assert str(caught.value) == "Connection refused"
    assert backlog_of(run_dir).records == 2498
    line.connect()
    sender.deliver()
    assert rows_in_mlflow(line.uri, run_dir) == rows_in_journal(run_dir)


def test_broken_in_the_midst_of_requests_everything_arrives_once(line: Any, run_dir: Path, journal: Journal) -> None:
    (run_dir / "recipe.toml").write_text("a = 1\n")
    journal.params({"lr": 0.1})
    journal.artifact("recipe.toml")
    for step in range(1500):
        journal.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": 0.1})
    for num_bytes in (1_000, 5_000, 60_000, 150_000):
        line.connect(num_bytes)
        with pytest.raises(OutageError):
            delivery(run_dir, line.uri).deliver()
        line.cut()
    line.connect()
    delivery(run_dir, line.uri).deliver()
    assert rows_in_mlflow(line.uri, run_dir) == rows_in_journal(run_dir)
    client, run = MlflowClient(line.uri), the_run(line.uri, run_dir)
    job = run.data.tags["disttrain.training.job"]
    assert len(client.search_runs([run.info.experiment_id], f"tags.`disttrain.training.job` = '{job}'")) == 1
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["recipe.toml"]


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_a_server_that_answers_with_errors_is_an_outage(run_dir: Path, journal: Journal, status: int) -> None:
    class Grumpy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status, "not today")

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Grumpy) as grumpy:
        threading.Thread(target=grumpy.serve_forever, daemon=True).start()
        journal.metrics(1, {"train/loss": 1.0})
        with pytest.raises(OutageError) as caught:
            delivery(run_dir, f"http://127.0.0.1:{grumpy.server_port}").deliver()
        grumpy.shutdown()
    assert "\n" not in str(caught.value)
    assert backlog_of(run_dir).records == 2


def test_a_row_that_mlflow_refuses_holds_up_nothing(server: Any, run_dir: Path, journal: Journal) -> None:
    said: list[str] = []
    sender = delivery(run_dir, server.uri, said)
    journal.params({"lr": 0.1})
    sender.deliver()
    # Behind our back, so that the sender cannot know that these values are taken.
    MlflowClient(server.uri).log_param(load_state(run_dir).run_id, "momentum", "0.5")
    journal.params({"momentum": 0.9, "seed": 1})
    journal.metrics(1, {"train/loss": 1.0})
    sender.deliver()
    run = the_run(server.uri, run_dir)
    assert run.data.params == {"lr": "0.1", "momentum": "0.5", "seed": "1"}
    assert run.data.metrics == {"train/loss": 1.0}
    assert len(said) == 1
    assert "momentum" in said[0]
    assert not backlog_of(run_dir)


def test_a_parameter_changed_by_a_restart_is_a_tag(server: Any, run_dir: Path, journal: Journal) -> None:
    said: list[str] = []
    journal.params({"train.epochs": 10, "optim.lr": 0.1})
    delivery(run_dir, server.uri, said).deliver()
    journal.params({"train.epochs": 20, "optim.lr": 0.1})
    delivery(run_dir, server.uri, said).deliver()
    run = the_run(server.uri, run_dir)
    assert run.data.params == {"train.epochs": "10", "optim.lr": "0.1"}
    assert run.data.tags["resumed.train.epochs"] == "20"
    assert said == []


def test_a_run_deleted_in_mlflow_is_made_anew(server: Any, run_dir: Path, journal: Journal) -> None:
    sender = delivery(run_dir, server.uri)
    journal.metrics(1, {"train/loss": 1.0})
    sender.deliver()
    first = load_state(run_dir).run_id
    MlflowClient(server.uri).delete_run(first)
    journal.metrics(2, {"train/loss": 0.5})
    with pytest.raises(OutageError, match="deleted"):
        sender.deliver()
    sender.deliver()
    assert load_state(run_dir).run_id != first
    assert rows_in_mlflow(server.uri, run_dir) == rows_in_journal(run_dir)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader")
def test_a_database_beside_the_runs(run_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    from disttrain.tracking import resolve_uri

    monkeypatch.chdir(run_dir)
    uri = resolve_uri(None, run_dir)
    assert uri == f"sqlite:///{run_dir.parent}/mlflow.db"
    (run_dir / "recipe.toml").write_text("a = 1\n")
    journal.metrics(1, {"train/loss": 1.0})
    journal.artifact("recipe.toml")
    delivery(run_dir, uri).deliver()
    assert rows_in_mlflow(uri, run_dir) == rows_in_journal(run_dir)
    assert [path.name for path in (run_dir.parent / "mlartifacts").rglob("*.toml")] == ["recipe.toml"]
    assert sorted(path.name for path in run_dir.iterdir()) == ["journal.jsonl", "mlflow.json", "recipe.toml"]
    # A stranger's database, who would have files put elsewhere.
    elsewhere = run_dir.parent / "elsewhere"
    artifacts = next((run_dir.parent / "mlartifacts").rglob("*.toml")).parent
    (artifacts / "charts").symlink_to(elsewhere)
    journal.artifact("recipe.toml", "charts")
    with pytest.raises(OutageError, match=f"{artifacts}/charts is a symbolic link"):
        delivery(run_dir, uri).deliver()
    with closing(sqlite3.connect(run_dir.parent / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET artifact_uri = ?", (elsewhere.as_uri(),))
    with pytest.raises(OutageError, match=f"the database has files stored in {elsewhere.as_uri()}, not in "):
        delivery(run_dir, uri).deliver()
    assert not elsewhere.exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (artifacts / "charts").unlink()
    delivery(run_dir, uri).deliver()
    assert not backlog_of(run_dir)


def test_files_that_cannot_be_stored_hold_up_no_metrics(
    server: Any, run_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "recipe.toml").write_text("a = 1\n")
    journal.artifact("recipe.toml")
    journal.metrics(1, {"train/loss": 1.0})
    journal.append("status", status="FINISHED")
    real: Callable[..., None] = MlflowClient.log_artifact

    def refuse(*args: object) -> None:
        raise PermissionError(13, "no permission", "/mlartifacts")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    with pytest.raises(OutageError, match="no permission"):
        delivery(run_dir, server.uri).deliver()
    run = the_run(server.uri, run_dir)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/loss": 1.0})
    assert (backlog_of(run_dir).records, backlog_of(run_dir).files) == (0, 2)
    monkeypatch.setattr(MlflowClient, "log_artifact", real)
    delivery(run_dir, server.uri).deliver()
    assert not backlog_of(run_dir)


def test_a_stopped_run_does_not_seem_to_run_while_its_charts_are_drawn(
    server: Any, run_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.metrics(1, {"train/loss": 1.0})
    journal.append("status", status="KILLED")
    seen: list[str] = []

    def draw(*_: object) -> dict[str, str]:
        seen.append(the_run(server.uri, run_dir).info.status)
        return {}

    monkeypatch.setattr("disttrain.tracking.mlflow.delivery.upload", draw)
    delivery(run_dir, server.uri).deliver(charts=False)
    assert (seen, backlog_of(run_dir).files) == ([], 1)  # nothing waits for them, and they are not forgotten
    delivery(run_dir, server.uri).deliver()
    assert (seen, backlog_of(run_dir).files) == (["KILLED"], 0)


@pytest.mark.parametrize("path", ["../../secret.txt", "/etc/passwd", "gone.txt"])
def test_a_journal_cannot_send_files_from_elsewhere(server: Any, run_dir: Path, journal: Journal, path: str) -> None:
    (run_dir.parent.parent / "secret.txt").write_text("secret")
    said: list[str] = []
    journal.artifact(path)
    delivery(run_dir, server.uri, said).deliver()
    assert MlflowClient(server.uri).list_artifacts(load_state(run_dir).run_id) == []
    assert len(said) == 1
    assert path in said[0]
    assert not backlog_of(run_dir)


@pytest.mark.parametrize("rubbish", ["", "{", "[]", '{"offset": "many"}', '{"other": 1}', '{"uploads": null}'])
def test_a_damaged_state_file_starts_delivery_again(run_dir: Path, rubbish: str) -> None:
    (run_dir / "mlflow.json").write_text(rubbish)
    assert load_state(run_dir).offset == 0


def test_a_run_that_is_moved_away_is_said_and_delivered_when_it_is_back(
    server: Any, run_dir: Path, journal: Journal
) -> None:
    said: list[str] = []
    sender = delivery(run_dir, server.uri, said)
    journal.metrics(1, {"train/loss": 1.0})
    sender.deliver()
    run_dir.rename(run_dir.with_name("elsewhere"))
    journal.metrics(2, {"train/loss": 0.5})
    for _ in range(2):
        sender.deliver()
    assert said == [
        f"{run_dir}/journal.jsonl is gone: if the run was moved or deleted, MLflow gets nothing more until the next "
        "checkpoint recreates it."
    ]
    run_dir.mkdir()  # as a save does
    journal.restore()
    journal.metrics(3, {"train/loss": 0.25})
    sender.deliver()
    assert [row[0] for row in rows_in_mlflow(server.uri, run_dir)["train/loss"]] == [1, 2, 3]
    assert len(said) == 1


def test_a_new_database_is_made_by_one_at_a_time(
    run_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{run_dir.parent}/new/mlflow.db"
    inside: list[int] = []
    most: list[int] = []

    class Slow:
        def __init__(self, uri: str) -> None:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()
            raise ConnectionError("this is far enough")

    monkeypatch.setattr("disttrain.tracking.mlflow.delivery.MlflowClient", Slow)

    def send() -> None:
        with pytest.raises(OutageError, match="far enough"):
            delivery(run_dir, uri).deliver()

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.mark.parametrize("folder", ["plain", "100 %"])
def test_a_lock_that_somebody_keeps_is_waited_for_so_long(tmp_path: Path, folder: str) -> None:
    uri = resolve_uri(None, tmp_path / folder / "run")
    assert uri is not None
    with one_at_a_time(uri), one_at_a_time(uri, patience_s=0.2):
        assert [path.name for path in tmp_path.rglob("*")] == [folder, ".mlflow.db.lock"]


@pytest.mark.long
def test_four_runs_that_begin_at_once_in_a_new_folder_all_reach_mlflow(tmp_path: Path, recipe: Any) -> None:
    folders = [tmp_path / "runs" / str(number) for number in range(4)]
    trackers = []
    for folder in folders:
        folder.mkdir(parents=True)
        trackers.append(Tracker(folder, recipe(), {}, warn=pytest.fail))
        trackers[-1].start(False, {"number": folder.name}, {})
    for tracker in trackers:
        assert not tracker.finish("FINISHED", timeout_s=200)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert {the_run(uri, folder).data.params["number"] for folder in folders} == {"0", "1", "2", "3"}
