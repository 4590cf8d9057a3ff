"""evaluate, predict and runs, on a real run; and what each says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from disttrain.checkpoint import CheckpointStore
from disttrain.commands import evaluate, predict, runs
from disttrain.data import load_datasets
from disttrain.distributed.world import join_world
from disttrain.recipe import load_recipe
from disttrain.worker import worker


def disttrain(*arguments: str | Path, timeout_s: float = 480) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "disttrain_launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


Worker = Callable[..., tuple[int, str, str]]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Worker:
    """Runs a command as its worker does, without the seconds that a new process takes: exit code and what it prints."""

    def call(command: click.Command, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["disttrain", *map(str, arguments)])
        code = worker(command)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits, by two workers, as a user would make it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = disttrain(
        "train", "digits", "-n", "2", "--run-dir", folder, "-o", "train.epochs=4", "-o", "tracking.uri=none"
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert done.stderr == ""
    return folder


def newest(run: Path) -> Path:
    return CheckpointStore(run / "checkpoints").paths()[-1]


def test_every_world_size_evaluates_to_the_same(run: Path, in_this_process: Worker) -> None:
    answers = [json.loads(disttrain("evaluate", run, "-n", "2", "--json").stdout)]
    answers.append(json.loads(in_this_process(evaluate.command, run, "--json")[1]))
    assert answers[0] == answers[1]
    stored = json.loads((run / "evaluation.json").read_text())
    assert {key: stored[key] for key in answers[0]} == answers[0]
    assert answers[0]["total"] == 360
    assert answers[0]["correct"] == round(answers[0]["accuracy"] * 360)
    assert set(answers[0]) >= {"correct", "total", "accuracy", "loss", "per_class"}


def test_looking_at_runs_imports_no_torch(run: Path) -> None:
    code = (
        "import sys; from disttrain.commands.runs import command; "
        "[command(words, standalone_mode=False) for words in (['list', '--runs-dir', '..'], ['show', '.'])]; "
        "sys.exit(' '.join({'torch', 'numpy', 'mlflow'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=run, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("finished") == 2


@pytest.mark.parametrize(
    "arguments", [("recipe", "schema"), ("runs", "show", "RUN", "--json"), ("evaluate", "RUN", "-n", "2", "--json")]
)
def test_a_reader_who_has_gone_is_no_failure(run: Path, arguments: tuple[str, ...]) -> None:
    """`disttrain ... | head` ends without a word, with the exit code that a shell reports of other programs."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "disttrain_launch", *[str(run) if word == "RUN" else word for word in arguments]]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=480)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_checkpoint_can_be_evaluated_wherever_it_lies(run: Path, tmp_path: Path, in_this_process: Worker) -> None:
    moved = shutil.copytree(newest(run), tmp_path / "elsewhere")
    code, out, said = in_this_process(evaluate.command, moved)
    assert code == 0, said
    assert "of 360" in out


def test_predict_names_what_is_in_a_picture(run: Path, tmp_path: Path, in_this_process: Worker) -> None:
    with join_world("cpu") as world:
        from contextlib import nullcontext

        test = load_datasets(load_recipe("digits").data, world, nullcontext).test
    images: Any = test.images  # type: ignore[union-attr]
    right = 0
    paths = []
    for index in range(20):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(paths[-1])
    answer = json.loads(disttrain("predict", run, *paths, "--json", "--top", "2").stdout)
    for index, prediction in enumerate(answer["predictions"]):
        first, second = prediction["classes"]
        assert first["probability"] >= second["probability"]
        right += first["class"] == test.classes[int(test.labels[index])]  # type: ignore[union-attr]
    assert right >= 17
    _, words, _ = in_this_process(predict.command, run, paths[0])
    assert words.startswith(f"{paths[0]}: ")
    assert words.count("%") == 3
    assert len(load_digits().target) == 1797


def test_runs_are_listed_shown_verified_and_hashed(run: Path, in_this_process: Worker) -> None:
    _, listed, _ = in_this_process(runs.command, "list", run.parent)
    assert "digits" in listed
    assert "finished" in listed
    shown = json.loads(in_this_process(runs.command, "show", run, "--json")[1])
    assert {key: shown[key] for key in ("name", "state", "step", "epoch", "world_size")} == {
        "name": "digits",
        "state": "finished",
        "step": 92,
        "epoch": 4,
        "world_size": 2,
    }
    assert shown["mlflow_run_id"] is None
    assert [entry["step"] for entry in shown["checkpoints"]]
    assert in_this_process(runs.command, "verify", run)[0] == 0
    digest = disttrain("runs", "hash", run).stdout.strip()
    assert len(digest) == 64
    assert in_this_process(runs.command, "hash", newest(run))[1].strip() == digest


def test_a_damaged_checkpoint_is_found_and_nothing_is_changed(
    run: Path, tmp_path: Path, in_this_process: Worker
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    victim = newest(copy) / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    verified = disttrain("runs", "verify", copy)
    assert verified.returncode == 78
    assert "model.safetensors is not what was written" in verified.stdout
    code, _, said = in_this_process(evaluate.command, copy)
    assert code == 0
    assert "The previous checkpoint is used" in said
    assert newest(copy).is_dir()


def test_damage_is_named_where_no_other_checkpoint_is_left(run: Path, tmp_path: Path, in_this_process: Worker) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    for path in CheckpointStore(copy / "checkpoints").paths():
        (path / "manifest.json").unlink()
    for words in (("hash", copy), ("hash", newest(copy)), ("verify", newest(copy))):
        code, out, said = in_this_process(runs.command, *words)
        assert code == 78
        assert "manifest.json cannot be read" in out + said
    going_on = disttrain("train", "--run-dir", copy, "-o", "train.max_steps=2")
    assert going_on.returncode == 0
    assert going_on.stderr.count("the previous checkpoint is used") == going_on.stderr.count("\n") - 1
    assert going_on.stderr.endswith("there is no other, so training starts over.\n")


def test_the_weights_load_in_plain_pytorch(run: Path) -> None:
    """The three lines of docs/runs.md."""
    from safetensors.torch import load_file

    from disttrain.models.net import Net

    model = Net(num_classes=10)
    model.load_state_dict(load_file(newest(run) / "model.safetensors"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 62_006
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("evaluate", "nowhere"), 2, "nowhere"),
        (("evaluate", "RUN", "-n", "0"), 2, "-n"),
        (("evaluate", "RUN", "-o", "data.rot=x"), 78, "data.root"),
        (("predict", "RUN"), 2, "FILE"),
        (("predict", "RUN", "nothing.png"), 78, "nothing.png"),
        (("predict", "nowhere", "TEXT"), 2, "nowhere"),
        (("runs", "show", "nowhere"), 2, "nowhere"),
        (("runs", "shwo"), 2, "shwo"),
    ],
)
def test_bad_input_gets_one_clear_message(run: Path, tmp_path: Path, arguments: Any, code: int, message: str) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    done = disttrain(*[{"RUN": run, "TEXT": text}.get(word, word) for word in arguments])
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_was_refused_before_it_began_is_listed_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net-1" / "logs").mkdir(parents=True)
    (tmp_path / "holiday").mkdir()
    monkeypatch.chdir(tmp_path)
    for words in (["list", "."], ["list", "--runs-dir", "."]):
        runs.command(words, standalone_mode=False)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("net-1  not begun  it is starting, or was refused or killed before its first step: see")
        assert line.endswith("net-1/logs")


@pytest.mark.parametrize(
    ("command", "arguments", "code", "message"),
    [
        (evaluate.command, ["."], 2, "neither a run directory"),
        (evaluate.command, ["EMPTY"], 2, "has no good checkpoint yet"),
        (evaluate.command, ["RUN", "-o", "train.device=cuda"], 78, "train.device = 'cuda': PyTorch sees no GPU here"),
        (predict.command, ["RUN", "TEXT"], 78, "cannot be read as a picture"),
        (runs.command, ["list", "TEXT"], 2, "is not a folder"),
        (runs.command, ["list", "--runs-dir", "nowhere"], 2, "nowhere does not exist; give the folder that holds"),
        (runs.command, ["hash", "."], 2, "neither a run directory"),
        (runs.command, ["verify", "."], 2, "not a run directory"),
        (runs.command, ["show", "."], 2, "not a run directory"),
    ],
)
def test_so_does_bad_input_that_only_the_worker_can_see(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: click.Command,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    text, empty = tmp_path / "text.png", tmp_path / "empty"
    text.write_text("not a picture")
    empty.mkdir()
    shutil.copy(run / "recipe.toml", empty)
    words = {"RUN": str(run), "TEXT": str(text), "EMPTY": str(empty)}
    monkeypatch.setattr(sys, "argv", ["disttrain", *[words.get(word, word) for word in arguments]])
    assert worker(command) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
