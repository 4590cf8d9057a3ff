"""Names, texts and surroundings as they come: the command line and what it hands on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from disttrain.commands import predict
from disttrain.layout import JOURNAL, RECIPE
from disttrain.recipe import load_recipe, to_toml
from disttrain_launch.cli import launched, main

NOT_UTF8 = os.fsdecode(b"r\xff\xc3\xa9")  # as ls shows it: r?é


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs: one whose name is not UTF-8, and one that cannot be read."""
    folder = tmp_path / "runs…"
    for name in (NOT_UTF8, "broken"):
        (folder / name).mkdir(parents=True)
        (folder / name / RECIPE).write_text(to_toml(load_recipe("digits")))
    (folder / "broken" / JOURNAL).touch()
    (folder / "broken" / "checkpoints").symlink_to("checkpoints")  # a loop: whatever looks at it fails
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_an_output_of_any_encoding_and_an_unreadable_run(runs: Path, encoding: str) -> None:
    command = [sys.executable, "-m", "disttrain_launch", "runs", "list", "--runs-dir", str(runs)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.splitlines()
    written = {"utf-8": b"r\xff\xc3\xa9", "latin-1": b"r\xff\xe9", "ascii": b"r\xff?"}[encoding]
    assert any(line.startswith(written) and b"new" in line for line in lines), lines
    assert any(line.startswith(b"broken") for line in lines), lines


def test_in_a_bare_environment_a_path_is_printed_as_it_was_given() -> None:
    command = [
        sys.executable,
        "-m",
        "disttrain_launch",
        "train",
        "digits",
        "--dry-run",
        "--run-dir",
        b"/r/\xff\xc3\xa9",
    ]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=240, check=True)
    assert done.stdout.rstrip().endswith(b"--run-dir '/r/\xff\xc3\xa9'")


def test_an_unreadable_run_is_a_row_and_hides_no_other(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from disttrain.commands import runs as command
    from disttrain.runs import summary

    def summarise(run: Path) -> dict[str, object]:
        if run.name == "broken":
            raise PermissionError(13, "Permission denied")
        return before(run)

    before = summary.summarise
    monkeypatch.setattr(summary, "summarise", summarise)
    result = CliRunner().invoke(command.command, ["list", "--json", "--runs-dir", str(runs)])
    assert result.exit_code == 0, result.exception
    rows = {row["name"]: row for row in json.loads(result.output)["runs"]}
    assert rows["broken"] == {"name": "broken", "state": "unreadable", "error": "Permission denied"}
    assert rows[NOT_UTF8]["state"] == "new"


def test_a_dash_in_front_makes_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.toml").write_text('[data]\ndataset = "digits"\n')
    (tmp_path / "-run").mkdir()
    (tmp_path / "-i.png").touch()
    shown = CliRunner().invoke(main, ["recipe", "show", "--json", "--", "-x.toml"])
    assert shown.exit_code == 0, shown.output
    planned = CliRunner().invoke(main, ["train", "--dry-run", "--run-dir", "-new", "--", "-x.toml"])
    assert " ./-x.toml --run-dir " in planned.output
    handed_on: list[str] = []
    monkeypatch.setattr(launched, "become", lambda _module, words: handed_on.extend(words))
    predicted = CliRunner().invoke(main, ["predict", "--", "-run", "-i.png"])
    assert predicted.exit_code == 0, predicted.output
    with predict.command.make_context("predict", handed_on) as context:
        assert context.params["address"] == "./-run"
        assert context.params["files"] == ("-i.png",)
