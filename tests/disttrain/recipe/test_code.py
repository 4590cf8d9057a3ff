"""Code beside its recipe: found wherever the command is started, and found again by what becomes of the run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import disttrain
from disttrain.commands import evaluate
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.recipe import load_recipe, to_toml
from disttrain.runs.rundir import resume_command

NET = "from disttrain.models.net import Net\n"
RECIPE = """
model.name = "net_beside_its_recipe:Net"
train.max_steps = 1
train.device = "cpu"
tracking.uri = "none"
tracking.system_metrics = false
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a recipe and its code; the current folder is another one."""
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "net_beside_its_recipe.py").write_text(NET)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield folder
    sys.modules.pop("net_beside_its_recipe", None)


def _forget() -> None:
    """As a new process would."""
    sys.modules.pop("net_beside_its_recipe", None)
    sys.path[:] = [entry for entry in sys.path if not entry.endswith(("/project", "/elsewhere"))]


def test_code_beside_a_recipe_is_found_from_everywhere_and_by_what_becomes_of_the_run(project: Path) -> None:
    before = list(sys.path)
    run = disttrain.train("../project/recipe.toml", run_dir="run").run_dir
    assert sys.path[: len(before) + 1] == [*before, str(project)], "behind all that is installed"
    assert load_recipe(str(run / "recipe.toml")).code == str(project)
    assert resume_command(run).endswith("--trust")

    _forget()
    asked = CliRunner().invoke(evaluate.command, [str(run)])
    assert f"model.name = 'net_beside_its_recipe:Net', code = '{project}'" in str(asked.exception)
    assert CliRunner().invoke(evaluate.command, [str(run), "--trust"]).exit_code == 0

    _forget()
    own = str(run / "recipe.toml")
    with pytest.raises(ConfigurationError, match="Add --trust"):
        disttrain.train(own, run_dir=run)
    assert disttrain.train(own, run_dir=run, trust=True, overrides=["train.max_steps=2"]).step == 2


def test_a_strangers_folder_is_asked_about_also_for_a_name_of_ones_own(project: Path) -> None:
    run = disttrain.train(project / "recipe.toml", run_dir="run").run_dir
    _forget()
    Path("mine.py").write_text(NET)
    asked = CliRunner().invoke(evaluate.command, [str(run), "-o", "model.name=mine:Net"])
    assert f"would be imported and run: code = '{project}'." in str(asked.exception)
    shipped = CliRunner().invoke(evaluate.command, [str(run), "-o", "model.name=net"])
    assert shipped.exit_code == 0
    assert str(project) not in sys.path, "nothing is imported by name"


def test_the_folder_is_that_of_the_file_unless_the_recipe_says_another(project: Path) -> None:
    path = project / "recipe.toml"
    assert load_recipe(str(path)).code == str(project)
    assert load_recipe(str(path), ["model.name=net"]).code is None
    assert load_recipe(str(path), ["code=here"]).code == str(Path("here").absolute())
    assert load_recipe("digits").code is None
    path.write_text(f'code = "../lib"\n{RECIPE}')
    assert load_recipe(str(path)).code == f"{project.parent}/lib"
    shown = to_toml(load_recipe(str(path)), comments=True)
    Path("shown.toml").write_text(shown)
    assert load_recipe("shown.toml") == load_recipe(str(path)), "what is shown finds the code from another place"


def test_a_folder_that_no_recipe_can_name_is_not_stored(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is found where training is started in it, as ever."""
    odd = project.rename(project.parent / "b\udcff")
    monkeypatch.chdir(odd)
    recipe = load_recipe("recipe.toml")
    assert recipe.code is None
    to_toml(recipe).encode()
    for words in (["code=lib"], ["code=."]):
        with pytest.raises(RecipeError, match="code: should be in a folder whose name is UTF-8"):
            load_recipe("recipe.toml", words)
    (odd / "recipe.toml").write_text(f'code = "lib"\n{RECIPE}')
    with pytest.raises(RecipeError, match="code"):
        load_recipe("recipe.toml")
    (project.parent / "nul.toml").write_text(f'code = "\\u0000"\n{RECIPE}')
    with pytest.raises(RecipeError, match=r"code: .*has a NUL character"):
        load_recipe("../nul.toml")


def test_a_module_of_another_recipe_is_not_taken_for_that_of_the_same_name(project: Path) -> None:
    """Two recipes in one program: Python would hand out the module that it has, and the other net would be trained."""
    disttrain.train("../project/recipe.toml", run_dir="one")
    other = project.parent / "other" / "project"
    shutil.copytree(project, other)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"is {project}/.*, and the recipe's is {other}/.*: rename one"):
            disttrain.train(other / "recipe.toml", run_dir="two")
    assert disttrain.train(other / "recipe.toml", overrides=[f"code={project}"], run_dir="two").step == 1
    _forget()
    assert disttrain.train(other / "recipe.toml", run_dir="three").step == 1
