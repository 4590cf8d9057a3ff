"""What a task's methods raise in the midst of training: named with step and place, and no other worker is blamed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.data import StepSampler
from disttrain.errors import DisttrainError, TaskError, UserCodeError, is_lost_peer
from disttrain.testing import run_workers
from disttrain.tracking.export import export_model
from disttrain.training.conclusion import exported_by, notes_of
from tests.disttrain.task.test_users_tasks import QUIET
from tests.disttrain.task.users import Regression, case

ORDER = StepSampler(38, batch_size=16).order(0).tolist()
BAD = ORDER[16 + 9]  # in the second step, and the second of two workers has it


def mistake(kind: str) -> Any:
    """What a line of the user's own raises."""
    if kind == "KeyError":
        return {}["gone"]
    return torch.zeros(2, 3) @ torch.zeros(2)


def failing(method: str, kind: str) -> disttrain.Task:
    """A task one of whose methods fails at the sample that is all 7."""

    def broken(self: Any, *arguments: Any) -> Any:
        batch: Any = arguments[-1]
        features = torch.stack([one for one, _ in batch]) if method == "collate" else batch[0]
        if (features == 7).all(1).any():
            mistake(kind)
        return getattr(Regression, method)(self, *arguments)

    return type("Failing", (Regression,), {method: broken})()


def run(folder: Path, task: disttrain.Task, *overrides: str, hooks: Any = ()) -> tuple[str, str, int, bool, str]:
    """How a training with one bad sample ends: kind of exception, message, exit code, lost a peer, and traceback."""
    one = case("regression")
    for samples, place in ((one.train_set, BAD), (one.test_set, 9)):
        samples[place] = (torch.full((10,), 7.0), torch.tensor(0.0))
    sets = {"train_set": one.train_set, "test_set": one.test_set}
    try:
        disttrain.train(QUIET, overrides=overrides, run_dir=folder, task=task, model=one.model, hooks=hooks, **sets)
    except DisttrainError as error:
        return type(error).__name__, str(error), int(error.exit_code), False, error.trace or ""
    except RuntimeError as error:
        return "RuntimeError", str(error), 1, is_lost_peer(error), ""
    raise AssertionError


@pytest.mark.parametrize("kind", ["KeyError", "RuntimeError"])
@pytest.mark.parametrize(("method", "place"), [("loss", "step 2"), ("score", "step 3, batch 3 of 3")])
def test_the_last_line_names_method_step_and_place(tmp_path: Path, method: str, place: str, kind: str) -> None:
    """A RuntimeError may have to do with the machine, and is worth a retry; the others would come again."""
    name, said, code, _, trace = run(tmp_path, failing(method, kind))
    reason = "'gone'" if kind == "KeyError" else r"size mismatch, .*"
    assert re.fullmatch(rf"Failing\.{method} at {place}: {kind}: {reason} \(.*test_faults_in_training\.py:\d+\)", said)
    assert (name, code) == (("TaskError", 78) if kind == "KeyError" else ("UserCodeError", 1))
    assert "in mistake" in trace
    assert "in broken" in (tmp_path / "logs" / "worker-0.log").read_text()


class OnOneRank(Regression):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and model.training:
            mistake("KeyError")
        return super().loss(model, batch)


CASES: dict[str, tuple[Callable[[], disttrain.Task], str]] = {
    "training": (lambda: failing("loss", "KeyError"), r"^Failing\.loss at step 2: KeyError: 'gone' \("),
    "rehearsal": (OnOneRank, r"^OnOneRank\.loss fails on .*: KeyError: 'gone' \("),
}


@pytest.mark.parametrize("name", CASES)
def test_the_worker_that_failed_is_the_cause_and_the_other_ends_at_once(tmp_path: Path, name: str) -> None:
    """The other has lost a worker, whatever it was in: that is worth a retry, and no mistake in the user's code."""
    make, words = CASES[name]

    def ending(folder: Path) -> tuple[str, str, int, bool, str]:
        return run(folder, make())

    other, failed = run_workers(ending, 2, args=(tmp_path,), process_group=False)
    assert re.search(words, failed[1])
    assert failed[2] == 78
    assert other[0] == "RuntimeError"
    assert other[3], other


class Gathering(disttrain.Hook):
    """Its collective finds another worker gone."""

    def after_step(self, context: disttrain.HookContext) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


def test_a_hook_that_loses_a_worker_is_no_mistake(tmp_path: Path) -> None:
    assert run(tmp_path, Regression(), hooks=Gathering)[2:4] == (1, True)


@pytest.mark.parametrize("method", ["collate", "weight"])
def test_what_a_task_raises_in_a_process_that_reads_data_arrives_in_a_line(tmp_path: Path, method: str) -> None:
    name, said, code, _, trace = run(tmp_path, failing(method, "KeyError"), "data.layout=stream", "data.workers=1")
    assert (name, code, trace) == ("TaskError", 78, "")
    what = {"collate": r"Failing cannot collate", "weight": r"Failing\.weight of the batch of"}[method]
    place = r"\(.*test_faults_in_training\.py:\d+\)"
    assert re.fullmatch(
        rf"{what} samples {ORDER[16]}, {ORDER[17]}, .* of the training set: KeyError: 'gone' {place}", said
    )


class Exported(Regression):
    def __init__(self, made: Any, notes: Any) -> None:
        self.made, self.notes = made, notes

    def export(self, model: nn.Module) -> Any:
        return self.made(model)

    def export_notes(self) -> Any:
        return self.notes()


@pytest.mark.parametrize(
    ("made", "notes", "reason"),
    [
        (lambda model: mistake("KeyError"), dict, r"Exported\.export: KeyError: 'gone' \(.*\.py:\d+\)"),
        (lambda model: model, dict, r"Exported\.export returned a Sequential: it has to be a tuple of a module and"),
        (lambda model: None, dict, r"Exported\.export returned None: it has to be"),
        (lambda model: model, lambda: mistake("KeyError"), r"Exported\.export_notes: KeyError: 'gone' \("),
        (lambda model: model, lambda: {"ids": {1}}, "Object of type set is not JSON serializable"),
    ],
)
def test_what_cannot_be_exported_fails_no_run(tmp_path: Path, made: Any, notes: Any, reason: str) -> None:
    task = Exported(made, notes)
    found = export_model(tmp_path / "model", case("regression").model, exported_by(task), notes_of(task))
    assert re.match(reason, found or "")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]


def test_an_exception_survives_the_way_between_processes() -> None:
    for kind in (UserCodeError, TaskError):
        error = pickle.loads(pickle.dumps(kind("sample 7", "Traceback")))
        assert (type(error), str(error), error.trace) == (kind, "sample 7", "Traceback")
