"""The command line: quick answers, and one clear message for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from disttrain.recipe import load_recipe
from disttrain_launch.cli import main
from disttrain_launch.local import workers as local

RECIPES = [
    "cifar10-fast", "cifar10-net", "cifar10-resnet18", "cifar100-resnet18", "digits", "folder-resnet18",
    "table-diabetes", "text-gpt",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "execv", refuse)


def run(*arguments: str) -> Result:
    """Run the command in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "Missing argument 'RECIPE'. Give one of cifar10-fast, "),
        (["train", "digits", "-n", "0"], "0 workers cannot train; give 1 or more."),
        (["train", "digits", "-n", "-3"], "-3 workers cannot train; give 1 or more."),
        (["train", "digits", "-n", "1000000"], "1000000 workers are too many for"),
        (
            ["train", "digits", "-n", "banana"],
            "'banana' is not a valid number of workers; give a whole number, gpu or auto.",
        ),
        (["train", "digits", "-n", "1.5"], "'1.5' is not a valid number of workers"),
        (["train", "digits", "--rundir", "x"], "No such option '--rundir'"),
        (["train", "digits", "cifar10-net"], "unexpected extra argument"),
        (["trian"], "No such command 'trian'"),
        (["train", "digits", "--workers", "2"], "No such option '--workers'. Did you mean -n (--num-workers)?"),
        (["evaluate"], "Missing argument 'RUN|CHECKPOINT'"),
        (["evaluate", "nowhere"], "'nowhere' does not exist"),
        (["evaluate", ".", "-n", "none"], "'none' is not a valid number of workers"),
        (["predict", "."], "Missing argument 'FILE...'"),
        (["predict", "nowhere", "cat.jpg"], "'nowhere' does not exist"),
        (["predict", ".", "x", "--top", "0"], "0 is not in the range x>=1"),
        (["doctor", "--rendezvous", "node-0"], "'node-0' should be HOST:PORT, as in node-0:29500."),
        (["doctor", "--rendezvous", "node-0:99999"], "'node-0:99999' should be HOST:PORT"),
        (["doctor", "-o", "optim.lr=1"], "-o changes a key of a recipe: give RECIPE, too."),
        (["doctor", "--timeout", "0"], "0 is not in the range"),
        (["runs", "show", "nowhere"], "'nowhere' does not exist"),
        (["runs", "hash"], "Missing argument 'RUN|CHECKPOINT'"),
        (["recipe", "show"], "Missing argument 'RECIPE'"),
    ],
)
def test_wrong_command_lines(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "digit"],
            f"no recipe 'digit': it is neither a file nor one of {', '.join(RECIPES)}; did you mean digits?",
        ),
        (["train", "./my.toml"], f"./my.toml: no such file; give a TOML file or one of {', '.join(RECIPES)}"),
        (["train", "digits", "-o", "optim.lrr=1"], "-o optim.lrr: unknown key; did you mean optim.lr?"),
        (["train", "digits", "-o", "lr=1"], "-o lr: unknown key; did you mean optim.lr?"),
        (["train", "digits", "-o", "train.epochs"], "-o train.epochs: should be key=value, as in -o optim.lr=0.1"),
        (
            ["train", "digits", "-o", "optim.name=adamm"],
            "optim.name = 'adamm': torch.optim has no such optimizer for dense gradients; did you mean 'adam'?",
        ),
        (
            ["train", "digits", "-o", "model.name=torchvision:nope"],
            "model.name: torchvision has no classification model 'nope'; it has resnet18, vit_b_16 and many others.",
        ),
        (["recipe", "show", "digits", "-o", "train.epochs=0"], "-o train.epochs: should be at least 1, not 0"),
        (
            ["train", "--run-dir", "new"],
            "--run-dir HERE/new: no run to resume (it has no recipe.toml); give a RECIPE to start one",
        ),
    ],
)  # fmt: skip
def test_wrong_recipes(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    message = message.replace("HERE", os.getcwd())
    assert (result.exit_code, result.stdout, result.stderr) == (78, "", f"disttrain: {message}\n")
    assert os.listdir() == []


def test_each_mistake_has_a_line_of_its_own() -> None:
    result = run("train", "digits", "-o", "optim.lr=fast", "-o", "data.flip=1")
    assert result.exit_code == 78
    assert result.stderr.splitlines() == [
        'disttrain: -o data.flip: should be true, false or "alternate", not 1',
        "disttrain: -o optim.lr: should be a number, not 'fast'",
    ]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").touch()
    result = run("train", "digits", "--run-dir", "holiday")
    assert result.exit_code == 78
    assert result.stderr.startswith(f"disttrain: --run-dir {tmp_path}/holiday: is not empty and not a run directory")
    assert os.listdir("holiday") == ["photo.jpg"]


@pytest.mark.parametrize(
    ("code", "logged", "words", "left"),
    [
        (78, "", [], []),
        (78, "the traceback that the message speaks of", [], ["logs"]),
        (1, "", [], ["logs"]),
        (78, "", ["--run-dir", "runs/mine"], ["logs"]),
    ],
)
def test_a_start_that_is_refused_leaves_no_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, code: int, logged: str, words: list[str], left: list[str]
) -> None:
    def refused(*_: object) -> None:
        (folder,) = Path("runs").iterdir()
        (folder / "logs" / "worker-0.log").write_text(logged)
        raise SystemExit(code)

    monkeypatch.setattr(local, "run_workers", refused)
    assert run("train", "digits", *words).exit_code == code
    assert [entry.name for folder in Path("runs").iterdir() for entry in folder.iterdir()] == left


def test_logs_are_not_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").symlink_to(tmp_path / "elsewhere")
    result = run("train", "digits", "--run-dir", "run")
    assert result.exit_code == 78
    assert f"{tmp_path}/run/logs: it is a symbolic link, and none is followed here" in result.stderr
    assert os.listdir("elsewhere") == []


def test_stop_is_held_up_by_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").touch()
    os.mkfifo(tmp_path / "run/.lock")
    result = run("stop", "run")
    assert (result.exit_code, result.stderr) == (
        78, "disttrain: run/.lock: it is a named pipe, not a file; no run makes such a lock. Remove it.\n"
    )  # fmt: skip


def test_a_run_that_names_code_is_resumed_only_if_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").write_text('model.name = "nets:build"\n')
    refused = run("train", "--run-dir", "run")
    assert refused.exit_code == 78
    assert "names code that would be imported and run: model.name = 'nets:build'. Add --trust" in refused.stderr
    trusted = run("train", "--run-dir", "run", "--trust", "--dry-run")
    assert trusted.exit_code == 0
    assert trusted.stdout.rstrip().endswith("--trust")
    (tmp_path / "mine.toml").write_text('model.name = "nets:build"\n')
    assert run("train", "mine.toml", "--run-dir", "run", "--dry-run").exit_code == 0
    assert "--trust" in run("slurm", "render", "--run-dir", "run", "--trust").stdout


def test_what_a_killed_start_or_a_request_to_stop_leaves_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(local, "run_workers", lambda *group: started.append(group))
    (tmp_path / "new").mkdir()
    for name in ("stop", ".lock", ".epoch", "..epoch.writing", ".recipe.toml.writing"):
        (tmp_path / "new" / name).touch()
    assert run("train", "digits", "--run-dir", "new").stderr == ""
    assert len(started) == 1


def test_a_run_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for run_dir in ("notes", "notes/run"):
        result = run("train", "digits", "--run-dir", run_dir)
        assert result.exit_code == 78
        assert result.stderr.startswith(f"disttrain: --run-dir {tmp_path}/{run_dir}: ")
        assert result.stderr.count("\n") == 1


def test_gpus_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.commands.options.count_gpus", lambda: 0)
    result = run("train", "digits", "-n", "gpu")
    assert result.exit_code == 2
    assert "no NVIDIA GPU is visible on this machine; give a number of workers." in result.stderr


def test_one_worker_per_gpu_may_use_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of workers may: it says nothing of GPUs."""
    monkeypatch.setattr("disttrain.commands.options.count_gpus", lambda: 2)
    several = ["--nodes", "1", "--rendezvous", "127.0.0.1:29400", "--run-dir", "run"]
    for options in ([], several):
        assert "DISTTRAIN_DEVICE=cuda" in run("train", "digits", "-n", "gpu", "--dry-run", *options).stdout
        assert "DISTTRAIN_DEVICE" not in run("train", "digits", "-n", "2", "--dry-run", *options).stdout
    groups: list[Any] = []
    monkeypatch.setattr("disttrain_launch.local.workers.run_workers", lambda group, *_: groups.append(group))
    run("train", "digits", "-n", "gpu")
    assert groups[0].options == "-n gpu", "the command that resumes the run asks for GPUs, too"
    monkeypatch.setenv("DISTTRAIN_DEVICE", "cpu")  # the user's own, which workers inherit
    assert "DISTTRAIN_DEVICE" not in run("train", "digits", "-n", "gpu", "--dry-run").stdout


def test_recipe_list() -> None:
    lines = run("recipe", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES
    listed = json.loads(run("recipe", "list", "--json").stdout)["recipes"]
    assert [entry["name"] for entry in listed] == RECIPES
    assert all(entry["description"].endswith(".") or ":" in entry["description"] for entry in listed)


def test_recipe_show_prints_a_recipe(tmp_path: Path) -> None:
    shown = run("recipe", "show", "digits", "-o", "optim.lr=0.3").stdout
    assert "# the global batch" in shown
    (tmp_path / "mine.toml").write_text(shown)
    assert run("recipe", "show", "mine.toml").stdout == shown
    assert tomllib.loads(shown)["optim"]["lr"] == 0.3
    assert json.loads(run("recipe", "show", "digits", "--json").stdout)["data"]["dataset"] == "digits"


def test_recipe_schema() -> None:
    schema = json.loads(run("recipe", "schema").stdout)
    assert set(schema["properties"]) == {
        "name", "code", "task", "data", "model", "optim", "schedule", "train", "parallel", "checkpoint", "tracking"
    }  # fmt: skip


def test_help_says_a_sentence_of_every_command() -> None:
    for words in ([], ["train"], ["evaluate"], ["predict"], ["runs"], ["runs", "list"], ["runs", "show"],
                  ["runs", "verify"], ["runs", "hash"], ["recipe"], ["recipe", "list"], ["recipe", "show"],
                  ["recipe", "schema"], ["doctor"]):  # fmt: skip
        text = run(*words, "--help").stdout
        assert text.split("\n\n")[1].strip().split("\n\n")[0].rstrip().endswith((".", ":")), text


def test_a_tilde_is_the_home_folder_and_a_run_directory_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    several = ("--nodes=2", "--rendezvous=127.0.0.1:29400")
    for options in ((), several):
        for given, meant in (("~/a", f"{tmp_path}/home/a"), ("a", f"{tmp_path}/a"), ("s3://b/a", "s3://b/a")):
            assert f" --run-dir {meant}" in run("train", "digits", "--run-dir", given, "--dry-run", *options).output
    made = tmp_path / "home/b"
    made.mkdir(parents=True)
    assert f"{made} is not a run directory" in run("stop", "~/b").output


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A recipe as the shell hands one over that a command writes: `disttrain train <(command)`."""
    monkeypatch.delenv("DISTTRAIN_RECIPE", raising=False)
    reader, writer = os.pipe()
    os.write(writer, b"train.epochs = 7\n")
    os.close(writer)
    yield f"/dev/fd/{reader}"
    os.close(reader)
    os.environ.pop("DISTTRAIN_RECIPE", None)


@pytest.mark.parametrize("several", [(), ("--nodes=2", "--rendezvous=127.0.0.1:29400", "--run-dir=a")])
def test_a_recipe_that_can_be_read_only_once_reaches_all_workers(pipe: str, several: tuple[str, ...]) -> None:
    told = run("train", pipe, "--dry-run", *several).stdout
    assert f"disttrain {pipe} --run-dir" in told
    assert "DISTTRAIN_RECIPE=" in told
    for _ in range(2):  # in whatever process that has this environment: the agent, a worker, a worker after a restart
        assert load_recipe(pipe, ["optim.lr=0.5"]).train.epochs == 7


@pytest.mark.usefixtures("pipe")
def test_a_file_that_only_this_process_has_open_is_handed_on_too(tmp_path: Path) -> None:
    """As with `disttrain train /dev/stdin < mine.toml`: the workers' own standard input is another."""
    (tmp_path / "mine.toml").write_text("train.epochs = 7\n")
    with (tmp_path / "mine.toml").open() as file:
        assert "DISTTRAIN_RECIPE=" in run("train", f"/dev/fd/{file.fileno()}", "--dry-run").stdout
    assert "DISTTRAIN_RECIPE=" not in run("train", "mine.toml", "--dry-run").stdout


def test_kubernetes_gets_the_text_and_slurm_asks_for_a_file(pipe: str) -> None:
    assert "train.epochs = 7" in run("k8s", "render", pipe, "--name", "one", "--image", "i").stdout
    refused = run("slurm", "render", pipe)
    assert (refused.exit_code, refused.stderr) == (
        78, f"disttrain: {pipe}: a job that starts later cannot read it: save the recipe to a file.\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "text in UTF-8"), (b"a\0b", "not a recipe"), (b"#" * 60_000, ""), (b"[", "not valid TOML")],
)
def test_what_comes_out_of_a_pipe_may_be_anything(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTTRAIN_RECIPE", "of another")
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    result = run("train", f"/dev/fd/{reader}", "--dry-run")
    os.close(reader)
    assert message in result.stderr
    assert result.exit_code == (78 if message else 0)
    endless = run("train", "/dev/zero", "--dry-run")
    assert (endless.exit_code, "/dev/zero: not a recipe" in endless.stderr) == (78, True)


@pytest.mark.parametrize(
    "given",
    [
        ("predict", ".", "one.wav"),
        ("predict", ".", "one.wav", "--top", "1", "-o", "num_tokens=9"),
        ("runs", "show", "--json", "."),
        ("sync", ".", "--timeout", "3"),
        ("doctor", "--rendezvous", "node-0:29500"),
    ],
)
def test_what_needs_torch_is_handed_on_as_it_was_given(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("disttrain_launch.cli.launched.become", lambda module, words: started.append((module, words)))
    assert run(*given).exit_code == 0
    assert started == [(f"disttrain.commands.{given[0]}", list(given[1:]))]


def test_an_old_name_of_a_key_is_mentioned_once(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("[parallel]\nshards = 6\n")
    planned = run("train", str(tmp_path / "old.toml"), "-n", "2", "--dry-run")
    line = "disttrain: parallel.shards is called parallel.slices now; the old name still works\n"
    assert (planned.exit_code, planned.stderr) == (0, line)
    (tmp_path / "run").mkdir()
    (tmp_path / "old.toml").rename(tmp_path / "run" / "recipe.toml")
    resumed = run("train", "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert (resumed.exit_code, resumed.stderr) == (0, ""), "the run's own was written by an older version"
