"""A worker that comes to a run under way."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.runs.rundir import refuse_edited_recipe, store_recipe
from disttrain.training.given import Given
from disttrain.training.joining import open_joining, refuse_newer_code


def test_a_recipe_that_was_edited_since_the_run_began_is_refused(tmp_path: Path) -> None:
    """With another learning rate its weights would be others than those of the rest, and nothing would say so."""
    run = load_recipe("digits", ["parallel.exact=true"])
    store_recipe(tmp_path, run)
    edited = load_recipe("digits", ["parallel.exact=true", "optim.lr=0.5", "train.epochs=16"])
    unused: Any = None
    with (
        pytest.raises(ConfigurationError, match=r"optim.lr was 0\.05, now 0\.5; train.epochs was 15, now 16\."),
        open_joining(edited, unused, tmp_path, Given(), unused),
    ):
        pass
    of_another_machine = load_recipe("digits", ["parallel.exact=true", "data.root=/elsewhere", "tracking.uri=none"])
    refuse_edited_recipe(run.model_dump(mode="json"), of_another_machine)


def test_code_that_was_edited_since_the_run_began_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that joins would compute something else than the others, and nothing would say so."""
    stored, code = tmp_path / "recipe.toml", tmp_path / "mine.py"
    refuse_newer_code(stored)
    for file in (stored, code):
        file.touch()
    modules = {"mine": SimpleNamespace(__file__=str(code)), "built in": sys, "gone": SimpleNamespace(__file__="/gone")}
    monkeypatch.setattr("disttrain.training.joining.sys", SimpleNamespace(modules=modules))
    os.utime(code, (1_000_000_000, 1_000_000_000))
    os.utime(stored, (1_000_000_001, 1_000_000_001))
    refuse_newer_code(stored)
    os.utime(code, (1_000_000_002, 1_000_000_002))
    with pytest.raises(ConfigurationError, match=r"mine\.py has changed since the run began"):
        refuse_newer_code(stored)


@pytest.mark.parametrize(("slot", "expected"), [(None, "changed since the run began"), (1, "reached the model")])
def test_code_that_a_machine_of_several_has_installed_since_is_no_edited_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot: int | None, expected: str
) -> None:
    """Its launcher compares what the code says; when the copy was made says nothing there."""
    recipe = load_recipe("digits", ["parallel.exact=true", "train.threads=1"])
    store_recipe(tmp_path, recipe)
    os.utime(tmp_path / "recipe.toml", (1_000_000_000, 1_000_000_000))

    def reached(*_: object) -> None:
        raise ConfigurationError("reached the model")

    monkeypatch.setattr("disttrain.training.joining.check_model", reached)
    with join_world("cpu", threads=1) as world:
        unused: Any = None
        with (
            pytest.raises(ConfigurationError, match=expected),
            open_joining(recipe, replace(world, slot=slot), tmp_path, Given(), unused),
        ):
            pass
