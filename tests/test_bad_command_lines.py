"""Every command with missing, absurd and hostile arguments: one clear message, the right exit code, nothing harmed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from disttrain.commands import compare, evaluate, predict, runs, sync
from disttrain.errors import DisttrainError
from disttrain_launch.cli import main

COMMANDS: dict[tuple[str, ...], click.Command | None] = {
    ("train",): None,
    ("evaluate",): evaluate.command,
    ("predict",): predict.command,
    ("sync",): sync.command,
    ("prove",): None,
    ("doctor",): None,
    ("recipe", "list"): None,
    ("recipe", "show"): None,
    ("recipe", "schema"): None,
    ("runs", "list"): runs.command,
    ("runs", "show"): runs.command,
    ("runs", "verify"): runs.command,
    ("runs", "hash"): runs.command,
}
OPTIONS = ["-n", "-o", "--run-dir", "--runs-dir", "--json", "--top", "--uri", "--timeout", "--workers", "--kills",
           "--steps", "--rendezvous", "--", "-h"]  # fmt: skip
VALUES = [
    "", " ", "0", "-1", "1", "2.5", "1e999", "9" * 5000, "x" * 5000, "a/" * 2000, "none", "nan",
    "digits", "digits.toml",
    "optim.lr=0.1", "optim.lr=", "=", "train.epochs=0x" + "f" * 5000, "\udcff", "\n", "\x1b[31mred", "é☃", "../..",
    "/", "/dev/null", "http://[", "sqlite:///", "host:port", "host:1", "*", "%s%n", "{0}",
    "empty", "binary", "folder", "file/below", "recipe.toml", "run", "run/checkpoints", "run/checkpoints/step-00000001",
    "a run\nwith \u2603", "locked", "broken.toml", "loop",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a path should not be, and no command that starts a worker."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(random.Random(0).randbytes(999))
    (tmp_path / "broken.toml").write_bytes(b"\xff[")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("run", "a run\nwith \u2603"):
        checkpoint = tmp_path / name / "checkpoints/step-00000001"
        checkpoint.mkdir(parents=True)
        (tmp_path / name / "recipe.toml").write_text("")
        (tmp_path / name / "journal.jsonl").write_bytes(b"{}\n\xff\n")
        (checkpoint / "manifest.json").write_text("[]")
    (tmp_path / "locked").mkdir(mode=0)
    (tmp_path / "recipe.toml").write_text("[train]\nepochs = 'x'\n")

    def end(*_: Any, **__: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", end)
    monkeypatch.setattr("disttrain_launch.local.workers.run_workers", end)
    monkeypatch.setattr("disttrain_launch.prove.proof.Proof.carry_out", end)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def try_words(command: click.Command, words: list[str]) -> None:
    result = CliRunner().invoke(command, words)
    error = result.exception
    assert error is None or isinstance(error, SystemExit | DisttrainError), (words, result.exc_info)
    code = error.exit_code if isinstance(error, DisttrainError) else result.exit_code
    assert code in (0, 1, 2, 78), (words, code)
    assert "Traceback" not in result.output
    if code:
        said = str(error) if isinstance(error, DisttrainError) else result.output
        assert len(said) > 15, words


def some_words(chance: random.Random) -> list[str]:
    words: list[str] = []
    for _ in range(chance.randrange(5)):
        words.append(chance.choice(VALUES) if chance.randrange(3) else chance.choice(OPTIONS))
    return words


def try_command_lines(seeds: range, place: Path) -> None:
    before = contents(place)
    for seed in seeds:
        chance = random.Random(seed)
        path, inner = chance.choice(list(COMMANDS.items()))
        words = some_words(chance)
        try_words(main, [*path, *words])
        if inner is not None and "\udcff" not in words and path != ("sync",) and path != ("evaluate",):
            try_words(inner, [*path[1:], *words])
        after = contents(place)
        assert {name: after.get(name) for name in before} == before, (seed, path, words)


def test_absurd_command_lines(place: Path) -> None:
    try_command_lines(range(500), place)


def test_each_absurd_value_in_each_place(place: Path) -> None:
    before = contents(place)
    for value in VALUES:
        for words in (
            ["train", value],
            ["train", "digits", "--run-dir", value],
            ["train", "--run-dir", value],
            ["train", "digits", "-o", value],
            ["train", "digits", "-n", value],
            ["prove", "digits", "--workers", value],
            ["prove", "digits", "--kills", value],
            ["evaluate", value],
            ["predict", value, "empty"],
            ["predict", "run", value],
            ["runs", "list", value],
            ["runs", "verify", value],
            ["sync", value],
            ["sync", "run", "--uri", value],
            ["doctor", value],
            ["doctor", "--rendezvous", value],
        ):
            try_words(main, words)
        for inner, words in (
            (runs.command, ["list", "--runs-dir", value]),
            (runs.command, ["show", value]),
            (runs.command, ["verify", value]),
            (runs.command, ["hash", value]),
            (predict.command, [value, "empty"]),
            (sync.command, [value]),
        ):
            if "\udcff" not in words:  # which only a real process can print: the next test but one
                try_words(inner, words)
    assert {name: contents(place).get(name) for name in before} == before


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_absurd_command_lines(place: Path) -> None:
    try_command_lines(range(1000, 11000), place)


def test_names_of_runs_that_are_hard_to_print(tmp_path: Path) -> None:
    """Through the real command line, in a process whose output is a pipe."""
    names = [b"plain name", "new\nline ☃".encode(), b"no utf-8 \xff"]
    for name in names:
        (tmp_path / os.fsdecode(name) / "checkpoints").mkdir(parents=True)
    # What most locales come to; with LANG=C Python is lenient by itself.
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for words in (["list", "--runs-dir", tmp_path], ["show", tmp_path / os.fsdecode(names[-1])]):
        command = [sys.executable, "-m", "disttrain.commands.runs", *words]
        done = subprocess.run(command, capture_output=True, timeout=480, env=strict)
        assert (done.returncode, done.stderr) == (0, b"")
        assert all(name in done.stdout for name in (names if words[0] == "list" else names[-1:]))


def test_compare_needs_checkpoints(place: Path) -> None:
    try_words(compare.command, ["run", "folder"])
