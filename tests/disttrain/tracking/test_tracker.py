"""The tracker as the training loop uses it, its sender a real process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from disttrain.tracking import Backlog, Tracker, backlog_of, last_status, load_state, read_journal
from tests.disttrain.tracking.exported import image_task

EVALUATION = {
    "classes": ["cat", "dog", "emu"],
    "per_class": {"cat": 0.9, "dog": 0.8, "emu": 0.7},
    "confusion": [[9, 1, 0], [1, 8, 1], [2, 1, 7]],
}


def senders() -> list[psutil.Process]:
    """The sender processes of this process."""
    return [child for child in psutil.Process().children() if "sender_process" in " ".join(child.cmdline())]


@pytest.fixture(autouse=True)
def _no_sender_is_left() -> Iterator[None]:
    yield
    assert senders() == []


def priorities(process: psutil.Process) -> set[int]:
    """Those of its threads: on Linux each has its own."""
    threads = Path(f"/proc/{process.pid}/task")
    numbers = [int(thread.name) for thread in threads.iterdir()] if threads.is_dir() else [process.pid]
    found = set()
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            found.add(os.getpriority(os.PRIO_PROCESS, number))
    return found


def kinds(run_dir: Path) -> list[str]:
    return [record["kind"] for record in read_journal(run_dir / "journal.jsonl")]


def wait_until(condition: Callable[[], bool], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.05)


def conclude(tracker: Tracker, run_dir: Path, chart: Path) -> None:
    """Before the sender is waited for it gives way to training, draws the charts and has sent all else there is."""
    (sender,) = senders()
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    wait_until(lambda: min(ours + 10, 19) in priorities(sender))
    tracker.conclude()
    wait_until(lambda: chart.exists() and all(one["kind"] == "charts" for one in load_state(run_dir).uploads))
    if sys.platform == "linux":
        assert os.getpriority(os.PRIO_PROCESS, sender.pid) == ours, "somebody will wait for it"


def test_a_whole_job_on_a_real_server(server: Any, run_dir: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of a job that was stopped and started again is in one MLflow run, and its model predicts as ours."""
    import mlflow
    from mlflow import MlflowClient

    (run_dir / "recipe.toml").write_text("name = 'digits'\n")
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    said: list[str] = []
    run_ids = []
    prepared: list[bool] = []
    monkeypatch.setattr("disttrain.tracking.export.warm_up", lambda: prepared.append(resumed))
    for resumed, steps in ((False, range(1, 6)), (True, range(4, 10))):
        settings = recipe(uri=server.uri).model_copy(update={"name": "digits-1.0"})
        tracker = Tracker(run_dir, settings, {"world_size": 2 + resumed, "launcher": "disttrain"}, warn=said.append)
        tracker.start(resumed, settings.model_dump(mode="json"), {"strategy": "ddp"})
        for step in steps:
            tracker.prepare_model()  # once in a start, and not before MLflow was reached
            tracker.metrics(step, {"train/loss": 1 / step, "system/node-0/cpu_percent": 50.0})
        tracker.event("evaluated", step=steps[-1])
        if resumed:
            tracker.metrics(9, {"eval/accuracy": 0.8, "eval/loss": 0.5})
            task = image_task((0.5,) * 3, (0.25,) * 3, EVALUATION["classes"], (3, 8, 8))
            charts = run_dir / "charts" / "per_class.png"
            charts.unlink()  # of the first start
            conclude(tracker, run_dir, charts)
            drawn_at = charts.stat().st_mtime_ns
            tracker.model(module, task.export, task.export_notes)
        assert not tracker.finish("FINISHED" if resumed else "KILLED", timeout_s=480)
        run_ids.append(load_state(run_dir).run_id)
    assert said == []
    assert prepared == [True]
    assert run_ids[0] == run_ids[1]
    assert charts.stat().st_mtime_ns == drawn_at, "drawn again, although nothing is new"

    client = MlflowClient(server.uri)
    run = client.get_run(run_ids[0])
    assert run.info.status == "FINISHED"
    assert [row.step for row in client.get_metric_history(run_ids[0], "train/loss")] == list(range(1, 10))
    assert run.data.metrics["eval/accuracy"] == 0.8
    assert run.data.metrics["system/node-0/cpu_percent"] == 50.0
    assert run.data.params["optim.name"] == "sgd"
    expected = {"launcher": "disttrain", "world_size": "3", "strategy": "ddp", "torch": torch.__version__}
    assert {name: run.data.tags[name] for name in expected} == expected
    files = {file.path for folder in (None, "charts") for file in client.list_artifacts(run_ids[0], folder)}
    charts = {f"charts/{name}.png" for name in ("learning_curves", "confusion_matrix", "per_class")}
    assert files == {"recipe.toml", "evaluation.json", "charts", *charts}

    mlflow.set_tracking_uri(server.uri)
    (stored,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_ids[0]}'")
    loaded = mlflow.pyfunc.load_model(f"runs:/{run_ids[0]}/digits-1_0")
    told = {
        (metric.key, metric.value, metric.dataset_name) for metric in client.get_logged_model(stored.model_id).metrics
    }
    assert told == {("eval/accuracy", 0.8, "digits"), ("eval/loss", 0.5, "digits")}
    assert [row.value for row in client.get_metric_history(run_ids[0], "eval/accuracy")] == [0.8]
    assert loaded.metadata.model_id == stored.model_id
    assert loaded.metadata.metadata == {"classes": EVALUATION["classes"]}
    assert str(loaded.metadata.signature.inputs) == "[Tensor('float32', (-1, 3, 8, 8))]"
    assert loaded.input_example.shape == (2, 3, 8, 8)
    module.eval()
    for num in (1, 5):
        images = np.random.default_rng(num).integers(0, 256, (num, 3, 8, 8)).astype(np.float32)
        ours = torch.softmax(module((torch.from_numpy(images) / 255 - 0.5) / 0.25), dim=1).detach().numpy()
        theirs = loaded.predict(images)
        assert (theirs.argmax(axis=1) == ours.argmax(axis=1)).all()
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def test_a_server_killed_and_revived_gets_everything(server: Any, run_dir: Path, recipe: Any) -> None:
    from mlflow import MlflowClient

    said: list[str] = []
    tracker = Tracker(run_dir, recipe(uri=server.uri), {}, warn=said.append)
    tracker.start(False, {"a": 1}, {})
    tracker.metrics(1, {"train/loss": 1.0})
    wait_until(lambda: load_state(run_dir).offset > 0)
    server.kill()
    try:
        costs = []
        for step in range(2, 300):
            begin = time.perf_counter()
            tracker.metrics(step, {"train/loss": 1 / step})
            costs.append(time.perf_counter() - begin)
        assert sorted(costs)[len(costs) // 2] < 300e-6

        def warned() -> bool:
            tracker.metrics(0, {})
            return bool(said)

        wait_until(warned)
    finally:
        server.start()
    assert not tracker.finish("FINISHED", timeout_s=240)
    assert len([text for text in said if "is not accepting" in text]) == 1
    client, run_id = MlflowClient(server.uri), load_state(run_dir).run_id
    assert [row.step for row in client.get_metric_history(run_id, "train/loss")] == list(range(1, 300))


def test_the_charts_do_not_wait_for_a_server_that_takes_all_the_time_there_is(
    run_dir: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    charts = run_dir / "charts" / "learning_curves.png"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker(run_dir, recipe(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), {}, warn=said.append)
        tracker.start(False, {}, {})
        silent.accept()[0].close()  # this attempt fails at once, the later ones are never answered

        def warned() -> bool:
            tracker.metrics(1, {"train/loss": 1.0})
            return bool(said)

        wait_until(warned)
        # The wait ends with the charts, or else before an attempt does.
        assert tracker.finish("FINISHED", timeout_s=50, unless=charts.is_file)
    assert charts.is_file()


def test_no_server_at_all_costs_little_and_is_made_up_for(line: Any, run_dir: Path, recipe: Any) -> None:
    from mlflow import MlflowClient

    said: list[str] = []
    tracker = Tracker(run_dir, recipe(uri=line.uri), {}, warn=said.append)
    begin = time.monotonic()
    tracker.start(False, {"lr": 0.1}, {})
    for step in range(50):
        tracker.metrics(step, {"train/loss": 1.0})
    assert time.monotonic() - begin < 5  # MLflow's own defaults wait for minutes
    missing = tracker.finish("FINISHED", timeout_s=240)
    assert time.monotonic() - begin < 200, "a dead server was waited for"
    assert missing.records == len(kinds(run_dir))
    assert len(said) == 2
    assert line.uri in said[0]
    assert "disttrain sync" in said[1]
    assert (run_dir / "charts" / "learning_curves.png").is_file()

    line.connect()
    later = Tracker(run_dir, recipe(uri=line.uri), {}, warn=said.append)
    assert later.backlog().records == missing.records
    assert later.catch_up(timeout_s=240) == later.backlog() == Backlog()
    run = MlflowClient(line.uri).get_run(load_state(run_dir).run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})


def test_a_server_that_never_answers_is_left_at_the_deadline(run_dir: Path, recipe: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = Tracker(run_dir, recipe(uri=uri), {}, warn=[].append)
        tracker.start(False, {}, {})
        begin = time.monotonic()
        missing = tracker.finish("KILLED", timeout_s=1.5)
        assert time.monotonic() - begin < 60
    assert missing.records == len(kinds(run_dir))
    assert "1.5 s" in missing.reason


def test_a_killed_sender_is_started_again(
    server: Any, run_dir: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "200")  # a slow server is no outage here
    said: list[str] = []
    tracker = Tracker(run_dir, recipe(uri=server.uri), {}, warn=said.append)
    tracker.start(False, {}, {})
    tracker.metrics(1, {"train/loss": 1.0})
    for number in range(2):  # the second one as the run ends
        (sender,) = senders()
        sender.kill()
        if not number:
            wait_until(lambda: tracker.metrics(2, {"train/loss": 0.5}) is None and bool(said))
    assert not tracker.finish("FINISHED", timeout_s=240)
    words = "the process that feeds MLflow was killed (SIGKILL): it is restarted, and resumes where it was."
    assert said == [words] * 2
    rows = MlflowClient(server.uri).get_metric_history(load_state(run_dir).run_id, "train/loss")
    assert [row.step for row in rows] == [1, 2]


def test_the_wait_for_a_server_can_be_ended(run_dir: Path, recipe: Any) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker(run_dir, recipe(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), {}, warn=said.append)
        tracker.start(False, {}, {})
        asked: list[int] = []
        assert tracker.finish("FINISHED", timeout_s=1e6, unless=lambda: bool(asked) or asked.append(1) is not None)
    assert f"`disttrain sync {run_dir}` uploads the rest" in said[-1]
    assert last_status(run_dir / "journal.jsonl") == "FINISHED"


def test_without_mlflow_installed_the_user_hears_of_it(
    run_dir: Path, tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('No module named mlflow')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said: list[str] = []
    tracker = Tracker(run_dir, recipe(), {}, warn=said.append)
    tracker.start(False, {}, {})
    assert tracker.finish("FINISHED", timeout_s=240)
    assert len(said) == 2
    assert "No module named mlflow" in said[0]


def test_passwords_appear_nowhere(line: Any, run_dir: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = line.uri.replace("//", "//alice:s3cret@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said: list[str] = []
    tracker = Tracker(run_dir, recipe(), {}, warn=said.append)
    tracker.start(False, {"tracking": {"uri": uri}}, {"uri": uri})
    tracker.event("failed", message=f"{uri} is down")
    (sender,) = senders()
    assert "s3cret" not in " ".join(sender.cmdline())
    tracker.finish("FAILED", timeout_s=240)
    line.connect()
    tracker = Tracker(run_dir, recipe(), {}, warn=said.append)
    tracker.start(True, {}, {})
    assert not tracker.finish("FINISHED", timeout_s=240)
    assert load_state(run_dir).uri == line.uri
    assert len(said) == 2
    for text in (*said, *(path.read_text() for path in run_dir.iterdir() if path.is_file())):
        assert "s3cret" not in text
        assert "alice" not in text


def test_a_killed_training_process_takes_its_sender_along(run_dir: Path, line: Any) -> None:
    code = (
        "import sys, time; from disttrain.tracking import Tracker; from disttrain.recipe import parse_recipe\n"
        f"tracker = Tracker({str(run_dir)!r}, parse_recipe({{'tracking': {{'uri': {line.uri!r}}}}}), {{}})\n"
        "tracker.start(False, {}, {}); tracker.metrics(1, {'a': 1.0}); print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == b"ready\n"
        (sender,) = psutil.Process(training.pid).children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            sender.send_signal(number)
        time.sleep(0.2)
        assert sender.is_running(), "the sender has to outlive what stops a training"
        training.kill()
        training.wait()
        sender.wait(timeout=480)


def test_nothing_is_printed(run_dir: Path, tmp_path: Path) -> None:
    """Neither while a job runs nor when the interpreter ends, finished or not."""
    code = (
        "import sys; from disttrain.tracking import Tracker; from disttrain.recipe import parse_recipe\n"
        "tracker = Tracker(sys.argv[1], parse_recipe({'tracking': {'uri': sys.argv[3] or None}}), {}, warn=print)\n"
        "tracker.start(False, {'a': 1}, {}); tracker.metrics(1, {'train/loss': 1.0})\n"
        "if sys.argv[2] == 'finish': print(tracker.finish('FINISHED', 100))"
    )
    for end, uri, expected in (("finish", "", "nothing\n"), ("forget", "http://127.0.0.1:9", "")):
        folder = run_dir.parent / end
        folder.mkdir()
        command = [sys.executable, "-c", code, folder, end, uri]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=480)
        assert (ended.stdout, ended.stderr, ended.returncode) == (expected, "", 0)
    wait_until(lambda: not backlog_of(run_dir.parent / "finish"))


def test_tracking_that_cannot_work_never_stops_a_training(run_dir: Path, recipe: Any) -> None:
    said: list[str] = []
    (run_dir / "journal.jsonl").mkdir()
    tracker = Tracker(run_dir, recipe(uri="none"), {}, warn=said.append)
    tracker.start(False, {}, {})
    tracker.metrics(1, {"a": 1.0})
    tracker.event("x")
    tracker.artifact("../outside.txt")
    assert not tracker.finish("FINISHED")
    assert len(said) == 1
    assert "training continues" in said[0]


def test_without_mlflow_the_journal_is_written(run_dir: Path, recipe: Any) -> None:
    tracker = Tracker(run_dir, recipe(uri="none"), {"world_size": 1})
    assert tracker.uri is None
    tracker.start(False, {"lr": 0.1}, {})
    tracker.metrics(1, {"a": 1.0})
    tracker.model(nn.Linear(1, 1), lambda model: None, dict)
    assert not tracker.finish("FINISHED")
    assert kinds(run_dir) == ["journal", "event", "params", "tags", "status", "metrics", "status"]
    assert os.listdir(run_dir) == ["journal.jsonl"]


def test_a_disabled_tracker_does_nothing(run_dir: Path, recipe: Any) -> None:
    tracker = Tracker(run_dir, recipe(), {}, enabled=False)
    tracker.start(False, {"lr": 0.1}, {})
    tracker.metrics(1, {"a": 1.0})
    tracker.event("x")
    tracker.artifact("x")
    tracker.model(nn.Linear(1, 1), lambda model: None, dict)
    assert not tracker.finish("FINISHED")
    assert os.listdir(run_dir) == []


def test_who_takes_over_adds_what_the_other_did_not_write_and_nothing_twice(run_dir: Path, recipe: Any) -> None:
    """Both have recorded the same; the one that kept the journal died before the end of it."""
    settings = recipe(uri="none")
    first, second = (Tracker(run_dir, settings, {}, enabled=enabled) for enabled in (True, False))
    first.start(resumed=False, params={}, tags={})
    for tracker in (first, second):
        tracker.metrics(1, {"train/loss": 1.0})
        tracker.event("evaluated", step=1)
        tracker.event("worker-lost", step=1, noticed=5.0)
    with (run_dir / "journal.jsonl").open("a") as journal:
        journal.write('{"time": 1, "kind": "metr')  # in the middle of a line
    second.metrics(2, {"train/loss": 0.5})
    second.event("worker-lost", step=1, noticed=6.0)
    assert kinds(run_dir).count("metrics") == 1
    second.take_over(2, lambda: None)
    second.metrics(2, {"train/loss": 0.5})
    second.event("evaluated", step=1)
    second.event("evaluated", step=2)
    second.finish("FINISHED")
    records = list(read_journal(run_dir / "journal.jsonl"))
    assert [record["step"] for record in records if record["kind"] == "metrics"] == [1, 2]
    assert [record["step"] for record in records if record.get("name") == "evaluated"] == [1, 2]
    assert [record["noticed"] for record in records if record.get("name") == "worker-lost"] == [5.0, 6.0]
    assert last_status(run_dir / "journal.jsonl") == "FINISHED"
