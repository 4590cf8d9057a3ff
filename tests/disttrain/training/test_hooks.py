"""A user's own code at agreed points: when it is called, what it may keep, and what is said of its faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.errors import ConfigurationError, RecipeError, UserCodeError
from disttrain.recipe import ask_before_resuming, load_recipe
from disttrain.runs.journal import read_journal
from disttrain.testing import run_workers
from disttrain.training.hooks import build_hooks
from tests.disttrain.training.test_init import IMAGES, LABELS, QUIET, Net

NAME = "tests.disttrain.training.test_hooks:Notes"


class Notes(disttrain.Hook):
    """Notes where it was called, and what it saw, across restarts."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def after_step(self, context: disttrain.HookContext) -> None:
        self.seen.append(context.step)
        context.log({"train/temperature": 0.5 * context.step})

    def after_evaluation(self, context: disttrain.HookContext) -> None:
        assert context.metrics["loss"] > 0
        self.seen.append(f"evaluated {context.step}")

    def at_end(self, context: disttrain.HookContext) -> None:
        self.seen.append(f"end {context.step}")

    def state(self) -> Any:
        return {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


def train(run_dir: Path, *overrides: str, hooks: Any = ()) -> Any:
    objects = {"train_set": (IMAGES, LABELS), "test_set": (IMAGES[:6], LABELS[:6])}
    recipe = load_recipe("digits", [*QUIET, *overrides])
    disttrain.train(recipe, run_dir=run_dir, model=Net(), hooks=hooks, **objects)
    return hooks[0].seen if hooks and isinstance(hooks[0], Notes) else None


def test_every_rank_calls_hooks_at_the_same_steps_and_their_state_survives(tmp_path: Path) -> None:
    def start(max_steps: int, every: int) -> Any:
        return train(tmp_path, f"train.max_steps={max_steps}", f"checkpoint.every_steps={every}", hooks=[Notes()])

    first = ["evaluated 2", 3, "evaluated 3"]
    assert start(3, 1) == [1, 2, *first, "end 3"]
    # What was seen after the last checkpoint was written is not in it; the rest goes on, on both workers alike.
    for seen in run_workers(start, 2, args=(4, 1), process_group=False):
        assert seen == [1, 2, *first, 4, "evaluated 4", "end 4"]
    state = read_checkpoint(CheckpointStore(tmp_path / "checkpoints").paths()[-1]).state
    assert state["hooks"] == {NAME: {"seen": [1, 2, *first, 4, "evaluated 4"]}}
    assert start(4, 1) == [1, 2, *first, 4, "evaluated 4"], "a run that is done calls none"
    logged = [
        record["metrics"]["train/temperature"]
        for record in read_journal(tmp_path / "journal.jsonl")
        if record["kind"] == "metrics" and "train/temperature" in record["metrics"]
    ]
    assert logged == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(ConfigurationError, match=f"trained with the hook {NAME}, whose state is in the checkpoint"):
        train(tmp_path, "train.max_steps=5")


def test_a_recipe_names_hooks_and_a_strangers_run_has_to_be_trusted(tmp_path: Path) -> None:
    train(tmp_path, f"train.hooks={NAME}", "train.max_steps=1")
    assert read_checkpoint(CheckpointStore(tmp_path / "checkpoints").paths()[-1]).state["hooks"][NAME]["seen"][0] == 1
    stored = load_recipe(str(tmp_path / "recipe.toml"))
    with pytest.raises(ConfigurationError, match=rf"names code that would be imported .*: train\.hooks = '{NAME}'"):
        ask_before_resuming(stored, tmp_path)
    with pytest.raises(RecipeError, match=r"train\.hooks: 'Notes' does not name a hook; write package\.module:Class"):
        load_recipe("digits", ["train.hooks=Notes"])


def test_a_single_hook_needs_no_list() -> None:
    for given in (Notes(), Notes, [Notes]):
        hooks = build_hooks((), given)
        hooks.load_state({NAME: {"seen": [1]}}, "the checkpoint")
        assert hooks.state() == {NAME: {"seen": [1]}}
    with pytest.raises(ConfigurationError, match=r"train\.hooks: a int is not a disttrain\.Hook; subclass it"):
        build_hooks((), 3)


class Broken(disttrain.Hook):
    def after_step(self, context: disttrain.HookContext) -> None:
        raise KeyError("temperature")


class Keeps(disttrain.Hook):
    def state(self) -> Any:
        return {"notes": {1, 2}}


@pytest.mark.parametrize(
    ("hook", "kind", "message"),
    [
        (Broken, UserCodeError, r"the hook .*:Broken, after_step: KeyError: 'temperature' \(.*test_hooks.py:\d+\)"),
        (Keeps(), ConfigurationError, r"the hook .*:Keeps: its state cannot be saved as JSON \(.*set"),
        (print, ConfigurationError, r"train\.hooks: a NoneType is not a disttrain\.Hook; subclass it"),
    ],
)
def test_a_fault_of_a_hook_names_it(tmp_path: Path, hook: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(tmp_path, "train.max_steps=2", hooks=[hook])
