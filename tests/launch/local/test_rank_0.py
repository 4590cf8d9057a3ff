"""Rank 0 dies, wherever it is: the lowest of the others takes its place, and nothing of the run is lost or twice."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import psutil
import pytest

from disttrain.testing import faults
from disttrain.tracking import load_state
from tests.launch.local.forked import Run
from tests.launch.local.test_losses import (
    CONTINUE,
    SAVING,
    check,
    check_what_is_written,
    disturbed,
    events,
    launch,
    undisturbed,
)

pytestmark = pytest.mark.long
PLACES: dict[str, list[tuple[str, int, int, int]]] = {
    "in a pass": [("step + 0.004", 0, 3, SIGKILL)],
    "before its own optimizer": [("before the commit", 0, 4, SIGKILL)],
    "after its own optimizer": [("after the commit", 0, 5, SIGKILL)],
    "in an evaluation": [("evaluation", 0, 1, SIGKILL)],
    "in the last evaluation": [("evaluation", 0, 2, SIGKILL)],
    "when a save begins": [("checkpoint: asked for", 0, 2, SIGKILL)],
    "in the middle of a write": [("checkpoint: begun", 0, 3, SIGKILL)],
    "between two files": [("checkpoint: tensors", 0, 2, SIGKILL)],
    "before a checkpoint has its name": [("checkpoint: written", 0, 3, SIGKILL)],
    "before a checkpoint is reported": [("checkpoint: named", 0, 2, SIGKILL)],
    "before old checkpoints are removed": [("checkpoint: retired", 0, 1, SIGKILL)],
    "in the last save": [("checkpoint: state", 0, 6, SIGKILL)],
    "while another loss is handled": [("step", 2, 3, SIGKILL), ("recovery: joined", 0, 1, SIGKILL)],
    "once another loss is handled": [("step", 2, 3, SIGKILL), ("recovery: agreed", 0, 1, SIGKILL)],
    "and who takes its place, as it locks the run": [("step", 0, 4, SIGKILL), ("succession: owner", 1, 1, SIGKILL)],
    "and who takes its place, later": [("before the commit", 0, 2, SIGKILL), ("succession: journal", 1, 1, SIGKILL)],
    "and all but one": [("step", rank, 4, SIGKILL) for rank in (0, 1, 2)],
    "when it wakes up": [("step", 0, 4, SIGSTOP)],
}


def test_wherever_rank_0_dies(tmp_path: Path) -> None:
    runs = {
        where: Run(str(tmp_path / where), signals=signals, overrides=(CONTINUE, SAVING, "train.hang_timeout_s=4"))
        for where, signals in PLACES.items()
    }
    ended = launch(undisturbed(tmp_path, SAVING), *runs.values())
    for (where, signals), one in zip(PLACES.items(), ended[1:], strict=True):
        check(tmp_path, [one], [rank for _, rank, _, _ in signals], where)
        if not any(rank == 1 for _, rank, _, _ in signals):  # what it keeps for rank 0 goes with it
            check_what_is_written(tmp_path / where, tmp_path / "undisturbed")


def test_an_evaluated_checkpoint_that_nobody_has_any_more_is_made_again(tmp_path: Path) -> None:
    """The worker that keeps a copy of it dies, too: if the others have made a step since, by a restart."""
    both = [("checkpoint: tensors", 0, 3, SIGKILL), ("succession: owner", 1, 1, SIGKILL)]
    reference, ended = launch(undisturbed(tmp_path, SAVING), disturbed(tmp_path, both, SAVING))
    if ended["exit_code"] == 0:
        check(tmp_path, [reference, ended], [0, 1])
        check_what_is_written(tmp_path / "disturbed", tmp_path / "undisturbed")
    else:
        assert "the checkpoint of step 5 was lost with the worker that wrote it" in ended["message"]


def test_the_user_and_mlflow_see_one_run(tmp_path: Path) -> None:
    """With the real launcher: the next worker prints in the place of rank 0, and its sender adds what is missing."""
    from mlflow import MlflowClient

    run_dir, server = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    overrides = (CONTINUE, "parallel.exact=true", f"tracking.uri={server}", "train.epochs=2", "train.log_every_steps=1")
    options = [word for override in overrides for word in ("-o", override)]
    command = [
        sys.executable,
        "-m",
        "disttrain_launch",
        "train",
        "digits",
        "-n",
        "3",
        "--run-dir",
        str(run_dir),
        *options,
    ]
    mark = uuid.uuid4().hex
    with faults.armed(faults.kill(0, step=9)) as armed:
        environment = {**os.environ, **armed, "DISTTRAIN_TEST_MARK": mark}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "rank 0 on" in ended.stdout
    assert "continuing with 2 workers from step 9" in ended.stdout
    assert "done in" in ended.stdout
    assert f"run         {run_dir}" in ended.stdout
    assert len(events(run_dir, "start")) == 1
    assert not events(run_dir, "resume")
    run = MlflowClient(server).get_run(load_state(run_dir).run_id)
    assert run.info.status == "FINISHED"
    rows = [row.step for row in MlflowClient(server).get_metric_history(run.info.run_id, "train/loss")]
    assert rows == list(range(1, max(rows) + 1))
    assert not (run_dir / ".lock").exists()
    assert not [one for one in psutil.process_iter(["environ"]) if mark in str(one.info["environ"])]
