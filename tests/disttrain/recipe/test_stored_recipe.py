"""A run's recipe: what is trained with is what its checkpoints vouch for, whatever becomes of recipe.toml."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import disttrain
from disttrain.errors import ConfigurationError
from disttrain.recipe import damage, load_recipe, load_recipe_for, recipe_of_checkpoints, to_toml
from disttrain.runs.rundir import refuse_other_recipe
from disttrain_launch.cli.recipe_source import checked_recipe
from disttrain_launch.cli.train import _opened
from tests.disttrain.parallel.exact_runs import SMALL

RECIPE = load_recipe("digits", [*SMALL[:-1], "train.max_steps=2", "checkpoint.every_steps=1", "optim.lr=0.0125"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("recipes") / "run"
    disttrain.train(RECIPE, run_dir=folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost": (lambda file: file.unlink(), "recipe.toml is lost"),
    "emptied": (lambda file: file.write_bytes(b""), r"recipe.toml is cut off \(it has no section task\)"),
    "cut": (lambda file: file.write_text(file.read_text().partition("[schedule]")[0]), "no section schedule"),
    "cut in a line": (lambda file: file.write_text(file.read_text()[:200].rstrip() + ' "'), "recipe.toml is damaged"),
    "zeros": (lambda file: file.write_bytes(b"\0" * 500), "recipe.toml is damaged"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_recipe_that_is_lost_or_damaged_is_restored(copy: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    injure, words = DAMAGES[how]
    injure(copy / "recipe.toml")
    assert checked_recipe(None, str(copy), ()) == RECIPE, "by the launcher, without torch"
    assert checked_recipe(None, str(copy), ("train.threads=1",)).train.threads == 1
    assert _opened(copy) == copy
    disttrain.train(f"{copy}/recipe.toml", overrides=["train.max_steps=3"], run_dir=copy)
    said = capsys.readouterr().err
    assert said.count("it is restored from checkpoints/step-00000002") == 1
    assert re.search(words, said)
    assert load_recipe(str(copy / "recipe.toml")) == RECIPE.model_copy(
        update={"train": RECIPE.train.model_copy(update={"max_steps": 3})}
    )


def test_a_recipe_with_one_digit_changed_is_refused_by_its_key(copy: Path) -> None:
    file = copy / "recipe.toml"
    file.write_text(file.read_text().replace("lr = 0.0125", "lr = 0.0725"))
    with pytest.raises(ConfigurationError, match=r"optim\.lr was 0\.0125, now 0\.0725\. .*step-00000002.* remove it"):
        disttrain.train(f"{copy}/recipe.toml", overrides=["train.max_steps=3"], run_dir=copy)
    disttrain.train(RECIPE, run_dir=copy)  # who gives the right one goes on, and has it restored
    assert file.read_text() == to_toml(RECIPE)


def test_a_key_that_was_not_given_is_called_unset() -> None:
    clipped = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"clip_norm": 1.0})})
    with pytest.raises(
        ConfigurationError, match=r"train\.clip_norm was unset, now 1\.0\. Choose a new --run-dir, or wait"
    ):
        refuse_other_recipe("runs/one", RECIPE, clipped, "wait")


def test_what_happens_to_lost_workers_may_change() -> None:
    """It is no part of the bits, and whoever learns of it wants it for the run that they have."""
    parallel = RECIPE.parallel.model_copy(update={"on_lost_worker": "continue"})
    refuse_other_recipe("runs/one", RECIPE, RECIPE.model_copy(update={"parallel": parallel}), "wait")


def test_a_damaged_checkpoint_vouches_for_nothing(copy: Path) -> None:
    newest, older = copy / "checkpoints/step-00000002", copy / "checkpoints/step-00000001"
    found = recipe_of_checkpoints(copy)
    assert found is not None
    assert found == (newest, RECIPE)
    (newest / "state.json").write_text((newest / "state.json").read_text().replace("0.0125", "0.0725"))
    assert recipe_of_checkpoints(copy) == (older, RECIPE)
    (older / "manifest.json").unlink()
    assert recipe_of_checkpoints(copy) is None
    (copy / "recipe.toml").unlink()
    with pytest.raises(ConfigurationError, match="no such file"):
        load_recipe_for(f"{copy}/recipe.toml", copy)


def test_a_folder_with_other_checkpoints_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="not a run directory"):
        disttrain.train(RECIPE, run_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="not a run directory"):
        _opened(tmp_path)


def test_a_recipe_from_before_there_were_tasks_is_whole(copy: Path) -> None:
    file = copy / "recipe.toml"
    before, task, after = file.read_text().partition("[task]")
    file.write_text(before + "[data]" + after.partition("[data]")[2])
    assert task
    assert damage(copy) is None
    assert load_recipe(str(file)) == RECIPE
