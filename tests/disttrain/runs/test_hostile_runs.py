"""Run directories and data folders that somebody prepared: links lead nowhere, and pipes hold nobody up."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import disttrain
from disttrain.agent.finished import is_finished
from disttrain.checkpoint import CheckpointStore
from disttrain.commands import predict, runs, sync
from disttrain.data.sources.folder import load_folder
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.files import being_written, open_to_append, replace_file
from disttrain.health.spikes import read_skipped
from disttrain.models import build_model
from disttrain.recipe import DataRecipe, load_recipe, parse_recipe, to_toml
from disttrain.runs.journal import Journal
from disttrain.runs.lock import owned
from disttrain.runs.rundir import log_to_file, owned_run_dir, refuse_links, stop_logging
from disttrain.terminal.console import Console
from disttrain.tracking import load_state
from disttrain.tracking.charts import draw_charts
from disttrain.tracking.mlflow.sender_process import sole_sender
from disttrain_launch.messages import complain

FILES = (
    ".lock", "recipe.toml", ".recipe.toml.writing", "evaluation.json", ".evaluation.json.writing", "spikes.json",
    ".spikes.json.writing", "journal.jsonl", "logs/worker-0.log", "logs/worker-7.log", "mlflow.json",
    ".mlflow.json.4711", ".mlflow.lock", ".remote", "stop",
)  # fmt: skip
FOLDERS = (
    "checkpoints", "logs", "charts", "model", ".model.tmp", "checkpoints/step-00000002",
    "checkpoints/.step-00000002.writing", "checkpoints/.step-00000002.replaced", "checkpoints/.step-00000001.retired",
)  # fmt: skip
OVERRIDES = ("tracking.uri=none", "train.max_steps=1", "train.device=cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint, as far as those that only look can tell."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(to_toml(load_recipe("digits", OVERRIDES)))
    (folder / "journal.jsonl").write_text('{"kind": "status", "status": "KILLED", "time": 1}\n')
    state = {"step": 2, "recipe": {}, "metrics": {}}
    CheckpointStore(folder / "checkpoints").save({"weight": torch.zeros(2)}, {}, state)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that a hostile run would like to reach."""
    folder = tmp_path / "elsewhere"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / "step-00000001" / "precious.txt").write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() if path.is_file() else "" for path in sorted(folder.rglob("*"))}


def in_its_place(path: Path) -> Path:
    """The path, with nothing there, in a folder that is."""
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_run_directory_with_a_link_is_refused_before_anything_is_touched(
    run: Path, elsewhere: Path, name: str
) -> None:
    entry = in_its_place(run / name)
    entry.symlink_to(elsewhere if name in FOLDERS else elsewhere / "precious.txt")
    before, there = contents(elsewhere), sorted(run.rglob("*"))
    with pytest.raises(ConfigurationError) as refused, owned_run_dir(run):
        pass
    assert str(refused.value).startswith(f"{entry}: it is a symbolic link")
    assert (contents(elsewhere), sorted(run.rglob("*"))) == (before, there)


@pytest.mark.parametrize("name", FILES)
def test_so_is_one_with_a_pipe(run: Path, name: str) -> None:
    os.mkfifo(in_its_place(run / name))
    with pytest.raises(ConfigurationError, match="named pipe"), owned_run_dir(run):
        pass


def test_a_folder_in_place_of_the_request_to_stop_is_named(run: Path) -> None:
    (run / "stop").mkdir()  # it could not be removed, and would stop every start
    with pytest.raises(ConfigurationError, match="stop: it is a folder, not a file"), owned_run_dir(run):
        pass


def test_train_and_sync_refuse_it(run: Path, elsewhere: Path) -> None:
    (run / "logs").symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(ConfigurationError, match="logs: it is a symbolic link"):
        disttrain.train("digits", overrides=OVERRIDES, run_dir=run)
    result = CliRunner().invoke(sync.command, [str(run)])
    assert isinstance(result.exception, ConfigurationError)
    assert contents(elsewhere) == before


def test_what_a_user_keeps_in_a_run_directory_is_left_alone(run: Path, elsewhere: Path) -> None:
    (run / "notes").symlink_to(elsewhere)
    (run / ".git").mkdir()
    (run / "checkpoints" / "latest").symlink_to("step-00000002")
    (run.parent / "latest").symlink_to(run)
    refuse_links(run.parent / "latest")


def save_delivery(run: Path) -> None:
    load_state(run).save(run)


def log(run: Path) -> None:
    handler = log_to_file(run, 0)
    logging.getLogger("disttrain").warning("this goes nowhere else")
    stop_logging(handler)


def draw(run: Path) -> None:
    record = '{"kind": "metrics", "time": 1, "step": %d, "metrics": {"train/loss": 1.0}}\n'
    (run / "journal.jsonl").write_text(record % 1 + record % 2)
    draw_charts(run)


def hold_the_lock(run: Path) -> None:
    with owned(run, patience_s=0):
        pass


def hold_the_senders_lock(run: Path) -> None:
    with sole_sender(run, SimpleNamespace(over=True)) as alone:  # type: ignore[arg-type]
        assert alone


def save_checkpoint(run: Path) -> None:
    CheckpointStore(run / "checkpoints").save({"weight": torch.ones(2)}, {}, {"step": 3})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        (".lock", hold_the_lock),
        ("evaluation.json", lambda run: replace_file(run / "evaluation.json", "new")),
        (".evaluation.json.writing", lambda run: replace_file(run / "evaluation.json", "new")),
        ("journal.jsonl", lambda run: Journal(run / "journal.jsonl")),
        ("logs/worker-0.log", log),
        ("logs/worker-1.log", lambda run: open_to_append(run / "logs" / "worker-1.log")),
        ("logs", log),
        ("mlflow.json", save_delivery),
        (".mlflow.json.PID", save_delivery),
        (".mlflow.lock", hold_the_senders_lock),
        ("charts", draw),
        ("charts/learning_curves.png", draw),
        (being_written(Path("charts/learning_curves.png")).as_posix(), draw),
        ("checkpoints", save_checkpoint),
        ("checkpoints/.step-00000003.writing", save_checkpoint),
    ],
)  # fmt: skip
def test_no_writer_follows_a_link_that_comes_later(
    run: Path, elsewhere: Path, name: str, write: Callable[[Path], Any]
) -> None:
    """The look at the start is not all: a file is opened so that a link at its name is no way out."""
    entry = in_its_place(run / name.replace("PID", str(os.getpid())))
    entry.symlink_to(elsewhere if name in FOLDERS or name.endswith("3.writing") else elsewhere / "precious.txt")
    before = contents(elsewhere)
    try:
        write(run)
    except (OSError, ConfigurationError) as error:
        assert "symbolic link" in str(error) or "File exists" in str(error)
    assert contents(elsewhere) == before


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (runs.command, ["verify", "RUN"]),
        (runs.command, ["hash", "RUN"]),
        (runs.command, ["show", "RUN"]),
        (runs.command, ["list", "--runs-dir", "RUNS"]),
        (predict.command, ["RUN", "PICTURE"]),  # evaluate finds the checkpoint in the same way
        (sync.command, ["RUN"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_pipes_hold_nobody_up(run: Path, command: click.Command, arguments: list[str]) -> None:
    """Each command comes to an end, and what it cannot do without is named."""
    for path in [path for path in run.rglob("*") if path.is_file()]:
        os.mkfifo(in_its_place(path))
    os.mkfifo(run / "mlflow.json")
    Image.new("RGB", (8, 8)).save(run.parent / "picture.png")
    words = {"RUN": str(run), "RUNS": str(run.parent), "PICTURE": str(run.parent / "picture.png")}
    result = CliRunner().invoke(command, [words.get(word, word) for word in arguments])
    assert result.exception is None or isinstance(result.exception, DisttrainError), result.exc_info
    if arguments[0] in ("verify", "hash") or command is predict.command:
        assert "it is a named pipe, not a file" in f"{result.output}{result.exception}"


def test_a_terminal_obeys_nothing_that_a_run_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences in it change no title, clear no screen and reach no clipboard."""
    evil, picture = "\x1b]52;c;cm0gLXJmIH4=\x07\x9b2J", run.parent / "picture.png"
    Image.new("L", (8, 8)).save(picture)
    recipe = load_recipe("digits", OVERRIDES)
    data = {"num_train": 9, "classes": [evil] * 2, "sample_shape": [1, 16, 16], "mean": [0.5], "std": [0.5]}
    weights = build_model(recipe.model, num_classes=2, sample_shape=(1, 16, 16)).state_dict()
    state = {"step": 3, "recipe": recipe.model_dump(mode="json"), "data": data, "metrics": {}}
    CheckpointStore(run / "checkpoints").save(weights, {}, state)
    (run / "checkpoints" / f"step-00000001.damaged{evil}").mkdir()
    (run / "mlflow.json").write_text(json.dumps({"run_id": evil, "uri": evil}))
    run.rename(named := run.with_name(f"run{evil}"))
    words = [str(named), "list", "--runs-dir", str(named.parent)]
    for command, arguments in (
        *((runs.command, arguments) for arguments in (["show", words[0]], ["verify", words[0]], words[1:])),
        (predict.command, [str(named), str(picture)]),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, result.exception
        assert "]52;c;" in result.output
        assert not set("\x1b\x07\x9b") & set(result.output)
    complain(f"{named} is in use")
    Console(speaks=True).warn(f"{named} is in use")
    shown = capsys.readouterr().err
    assert shown.count("]52;c;") == 2
    assert not set("\x1b\x07\x9b") & set(shown)


NESTED = '{"a":' * 600 + "0" + "}" * 600  # which Python's decoder takes, and a walk through it does not


@pytest.mark.parametrize("deep", [NESTED, "[" * 200_000], ids=["nested", "without end"])
def test_nothing_is_nested_too_deeply_to_be_refused_in_a_line(run: Path, deep: str) -> None:
    (run / "recipe.toml").unlink()
    state = run / "checkpoints" / "step-00000002" / "state.json"
    for content in (f'{{"step": 2, "recipe": {deep}}}', f'{{"recipe": {{}}, "epoch": {deep}, "step": {deep}}}'):
        state.write_text(content)
        manifest = json.loads((state.parent / "manifest.json").read_text())
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        manifest["files"]["state.json"] = {"size": len(content), "sha256": sha256}
        (state.parent / "manifest.json").write_text(json.dumps(manifest))
        Image.new("L", (8, 8)).save(run.parent / "picture.png")
        for command, arguments in (
            (runs.command, ["show", str(run)]),
            (runs.command, ["hash", str(run)]),
            (predict.command, [str(run), str(run.parent / "picture.png")]),
        ):
            error = CliRunner().invoke(command, arguments).exception
            assert error is None or isinstance(error, ConfigurationError)
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        parse_recipe({"data": json.loads(NESTED)})
    (run / "spikes.json").write_text(f'{{"skipped_steps": {deep}}}')
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        read_skipped(run)
    (run / "journal.jsonl").write_text(f'{{"kind": "status", "status": {deep}}}\n')
    assert not is_finished(str(run), "digits", ())


def test_an_address_that_no_file_can_have_is_asked_about(run: Path) -> None:
    (run / "mlflow.json").write_text(json.dumps({"uri": f"sqlite:///{run.parent}/mlflow.db\0", "experiment": "e"}))
    result = CliRunner().invoke(sync.command, [str(run)])
    assert isinstance(result.exception, ConfigurationError), result.exc_info


@pytest.mark.parametrize("in_place", ["a pipe", "a device", "a link to a pipe"])
def test_what_is_no_picture_is_named(tmp_path: Path, in_place: str) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    bad = tmp_path / "train" / "dog" / "1.png"
    if in_place == "a device":
        bad.symlink_to("/dev/zero")
    else:
        os.mkfifo(pipe := tmp_path / "pipe")
        os.mkfifo(bad) if in_place == "a pipe" else bad.symlink_to(pipe)
    data = DataRecipe(dataset="folder", root=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"1\.png: cannot be read as a picture \(it is a (named pipe|device)"):
        load_folder(data)


def test_links_to_pictures_are_followed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            (tmp_path / "root" / split / name / "0.png").symlink_to(tmp_path / "red.png")
    assert len(load_folder(DataRecipe(dataset="folder", root=str(tmp_path / "root"))).train) == 2


def test_a_converted_set_is_not_put_where_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "root" / split / name / "0.png")
    (tmp_path / "root" / ".disttrain").symlink_to(elsewhere)
    load_folder(DataRecipe(dataset="folder", root=str(tmp_path / "root")))
    assert list(elsewhere.iterdir()) == []
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
