"""The run directory: a new run has one of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

import disttrain
from disttrain import rundir
from disttrain.recipe import load_recipe
from disttrain.rundir import new_run_dir
from tests.disttrain.test_train import QUIET, network, samples


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
    assert [str(result.run_dir) for result in results] == [f"runs/digits-20260102-030405{end}" for end in ("", "-2")]


@pytest.mark.usefixtures("same_second")
def test_racing_runs_never_share_a_folder() -> None:
    recipe = load_recipe("digits")
    with ThreadPoolExecutor(8) as pool:
        made = [future.result() for future in [pool.submit(new_run_dir, recipe) for _ in range(24)]]
    assert len(set(made)) == 24
    assert all(path.is_dir() for path in made)
