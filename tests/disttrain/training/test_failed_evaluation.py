"""A mistake in what is made of an evaluation costs no training: the step is saved, and a resume evaluates it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.errors import TaskError
from disttrain.testing import run_workers
from tests.disttrain.task.test_users_tasks import QUIET
from tests.disttrain.task.users import Regression, case


class Seen(disttrain.Hook):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_evaluation(self, context: disttrain.HookContext) -> None:
        self.steps.append(context.step)

    def state(self) -> Any:
        return self.steps

    def load_state(self, state: Any) -> None:
        self.steps = state


class Fails(disttrain.Hook):
    """On these ranks, or on none."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def after_evaluation(self, context: disttrain.HookContext) -> None:
        if context.rank in self.ranks:
            raise ValueError("too few")


def too_few(*arguments: Any) -> Any:
    raise ValueError("too few")


def train(folder: Path, method: str = "", ranks: tuple[int, ...] = (), *overrides: str) -> tuple[str, list[int]]:
    """Train two epochs of three steps; the weights' hash, and the evaluations that a hook has seen."""
    one, seen = case("regression"), Seen()
    task = type("Mine", (Regression,), {method: too_few} if method else {})()
    disttrain.train(
        {**QUIET, "train": {**QUIET["train"], "epochs": 2, "patience": 5}},
        overrides=overrides,
        run_dir=folder,
        task=task,
        model=one.model,
        train_set=one.train_set,
        test_set=one.test_set,
        hooks=[seen, Fails(*ranks)],
    )
    weights = read_checkpoint(CheckpointStore(folder / "checkpoints").paths()[-1]).model
    return weights_sha256(weights), seen.steps


def failure(folder: Path, *arguments: Any) -> str:
    try:
        train(folder, *arguments)
    except TaskError as error:
        return f"{error.exit_code}: {error}"
    except RuntimeError:
        return "lost a worker"
    raise AssertionError


def saved(folder: Path) -> dict[str, Any]:
    """The only checkpoint, of the first epoch and as if nothing had been evaluated."""
    (path,) = CheckpointStore(folder / "checkpoints").paths()
    state = read_checkpoint(path).state
    assert (state["step"], state["metrics"], state["finished"]) == (3, {}, False)
    assert state["best_evaluation"] == {"value": None, "step": 0, "since": 0}
    assert next(iter(state["hooks"].values())) == []
    return state


@pytest.mark.parametrize("method", ["metrics", "details", "headline", ""])
def test_it_is_saved_and_a_resume_ends_as_if_nothing_had_failed(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(tmp_path / "run", method, () if method else (0,))
    assert said.startswith(f"78: Mine.{method}: ValueError" if method else "78: the hook ")
    saved(tmp_path / "run")
    shown = " ".join(capsys.readouterr().err.split())
    assert "the evaluation at step 3 failed, and a checkpoint of what was trained is saved." in shown
    assert train(tmp_path / "run") == train(tmp_path / "whole") == (train(tmp_path / "again")[0], [3, 6])


def test_workers_save_together_or_not_at_all(tmp_path: Path) -> None:
    """All fail, and what takes a collective to gather is saved; one fails, and the other neither joins it nor waits."""

    def endings(folder: Path, ranks: tuple[int, ...], strategy: str) -> str:
        return failure(folder, "", ranks, f"parallel.strategy={strategy}")

    for said in run_workers(endings, 2, args=(tmp_path / "both", (0, 1), "fsdp"), process_group=False):
        assert said.startswith("78: the hook ")
    assert saved(tmp_path / "both")["world_size"] == 2
    other, said = run_workers(endings, 2, args=(tmp_path / "one", (1,), "ddp"), process_group=False)
    assert other == "lost a worker"
    assert said.startswith("78: the hook ")


class OnRank0(disttrain.Hook):
    """Keeps what it has of each step where files are written."""

    def after_step(self, context: disttrain.HookContext) -> None:
        if context.rank == 0:
            self.kept = context.step

    def state(self) -> Any:
        return self.kept


def test_a_hook_is_asked_for_its_state_on_rank_0_alone(tmp_path: Path) -> None:
    def trained() -> int:
        one = case("regression")
        sets = {"train_set": one.train_set, "test_set": one.test_set}
        return disttrain.train(QUIET, run_dir=tmp_path, task=Regression(), model=one.model, hooks=OnRank0, **sets).step

    assert run_workers(trained, 2, process_group=False) == [3, 3]
