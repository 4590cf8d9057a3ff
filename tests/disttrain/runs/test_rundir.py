"""The run directory: a new run has one of its own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import cast

import pytest
import torch

import disttrain
from disttrain.recipe import load_recipe
from disttrain.runs import rundir
from disttrain.runs.rundir import new_run_dir
from tests.disttrain.training.test_train import QUIET, network, samples


class OneSecond(datetime):
    """A clock on which everything happens in the same second."""

    @classmethod
    def now(cls, tz: object = None) -> OneSecond:
        return cls(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def same_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rundir, "datetime", OneSecond)


@pytest.mark.usefixtures("same_second")
def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    """From Python, as with `python -m disttrain` and torchrun: the second trains, and does not return the first's."""
    results = [
        disttrain.train(
            load_recipe("digits", [*QUIET, f"train.max_steps={steps}"]),
            model=network(),
            train_set=samples(70),
            test_set=samples(31, 1),
        )
        for steps in (1, 2)
    ]
    assert [result.step for result in results] == [1, 2]
    names = [f"digits-20260102-030405{end}" for end in ("", "-2")]
    assert [result.run_dir for result in results] == [tmp_path / "runs" / name for name in names]


def test_a_request_to_stop_a_run_that_never_began_is_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stop").touch()
    recipe = load_recipe("digits", [*QUIET, "train.max_steps=1", "data.batch_size=64"])
    result = disttrain.train(recipe, run_dir=tmp_path, model=network(), train_set=samples(70), test_set=samples(31, 1))
    assert result.step == 1
    assert not (tmp_path / "stop").exists()
    assert f"{tmp_path}/stop was left over from an earlier start and is removed" in capsys.readouterr().out


class Wanderer(torch.nn.Sequential):
    """A user's model that leaves the folder in which it was started."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        os.chdir("/")
        return cast("torch.Tensor", super().forward(images))


@pytest.mark.parametrize("run_dir", ["~/mine", "mine"])
def test_a_run_stays_where_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    recipe = load_recipe("digits", [*QUIET, "train.max_steps=1", "data.batch_size=64"])
    model = Wanderer(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    result = disttrain.train(recipe, run_dir=run_dir, model=model, train_set=samples(70), test_set=samples(31, 1))
    assert result.run_dir == home / "mine"
    assert {"recipe.toml", "journal.jsonl", "checkpoints"} <= {path.name for path in result.run_dir.iterdir()}
    assert [path.name for path in home.iterdir()] == ["mine"]


@pytest.mark.usefixtures("same_second")
def test_racing_runs_never_share_a_folder() -> None:
    recipe = load_recipe("digits")
    with ThreadPoolExecutor(8) as pool:
        made = [future.result() for future in [pool.submit(new_run_dir, recipe) for _ in range(24)]]
    assert len(set(made)) == 24
    assert all(path.is_dir() for path in made)
