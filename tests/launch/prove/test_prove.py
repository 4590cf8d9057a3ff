"""`disttrain prove`: real runs, real kills, and an honest answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from disttrain_launch.prove.disturbed import DisturbedRun, disturb
from disttrain_launch.prove.losses import Pace
from disttrain_launch.prove.report import as_table

ROOT = Path(__file__).parents[3]
TINY = ("data.dataset=synthetic", "data.options={num_train=64, num_test=8}", "data.batch_size=16")
# Knows how many workers there are, which exact mode cannot see and prove must.
PEEKING = """
import os
from torch import nn

class Peeking(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, images):
        return self.linear(images.flatten(1)) * (1 + 1e-3 * (os.environ["WORLD_SIZE"] == "2"))

def build(num_classes, sample_shape):
    return Peeking(num_classes)
"""


def command(*arguments: str, recipe: str = "digits") -> list[str]:
    overrides = [word for override in (*TINY, "train.epochs=100") for word in ("-o", override)]
    return [sys.executable, "-m", "disttrain_launch", "prove", recipe, *overrides, *arguments]


def prove(cwd: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    temporary = cwd / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": f"{cwd}{os.pathsep}{ROOT}"}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, env=environment, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def left_in(cwd: Path) -> list[Path]:
    return [path for path in (cwd / "temporary").iterdir() if path.name.startswith("disttrain-prove-")]


@pytest.mark.parametrize("workers", [[1], pytest.param([1, 2], marks=pytest.mark.long)])
def test_exact_mode_is_proven(tmp_path: Path, workers: list[int]) -> None:
    numbers = ",".join(map(str, workers))
    done = prove(tmp_path, "--workers", numbers, "--kills", "1", "--steps", "30", "--strategy", "fsdp,ddp", "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["same"] is True
    assert answer["exact"] is True
    assert answer["first_difference"] is None
    assert [run["workers"] for run in answer["runs"]] == workers
    for run in answer["runs"]:
        assert run["same"] is True
        assert run["kills"] == 1
        assert run["resumed_with"] == [3 - run["workers"] if len(workers) > 1 else 1]
        assert run["strategies"] == ["fsdp", "ddp"]
        assert run["steps_repeated"] >= 0
        for name in ("weights_sha256", "optimizer_sha256"):
            assert run[name] == answer["reference"][name]
            assert len(run[name]) == 64
    assert answer["reference"] == {**answer["reference"], "workers": 1, "kills": 0, "steps": 30}
    assert left_in(tmp_path) == []
    assert done.stderr == ""


def test_a_killed_run_resumes_with_another_number_of_workers_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    run = DisturbedRun(tmp_path, [])
    monkeypatch.setattr(run, "run_until_killed", lambda workers, *_: started.append(workers) is None)
    monkeypatch.setattr(run, "run", lambda workers, _: started.append(workers))
    disturb(run, 2, (1, 2, 4), kills=20, losses=0, num_steps=100, pace=Pace(0.0, 0.0))
    assert (len(started), started[0]) == (21, 2)
    assert set(started) <= {1, 2, 4}
    assert all(before != after for before, after in pairwise(started))
    started.clear()
    disturb(run, 3, (3,), kills=2, losses=0, num_steps=100, pace=Pace(0.0, 0.0))
    assert started == [3, 3, 3]


@pytest.mark.long
def test_the_first_step_and_tensor_that_differ_are_named(tmp_path: Path) -> None:
    (tmp_path / "peeking.py").write_text(PEEKING)
    sparse = ["-o", "model.name=peeking:build", "-o", "checkpoint.every_steps=3"]
    done = prove(tmp_path, *sparse, "--workers", "1,2", "--kills", "0", "--steps", "6", code=1)
    assert "NOT the same bits: 6 steps, 2 disturbed runs, 0 kills" in done.stdout
    # Checkpoints are 3 steps apart; the step itself is found by training from the last common state once more.
    assert "The first difference is 'linear.bias' at step 1, after step 0 was the same." in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()[2:5]]
    assert [row[-1] for row in rows] == ["reference", "yes", "NO"]
    (kept,) = left_in(tmp_path)
    assert f"The runs are kept in {kept}" in done.stdout


@pytest.mark.long
def test_fast_mode_is_proven_at_one_number_of_workers(tmp_path: Path) -> None:
    done = prove(tmp_path, "--workers", "1", "--kills", "0", "--steps", "3")
    assert "fast mode, which promises the same bits at one number of workers only" in done.stderr
    assert "same bits with 1 worker (fast mode promises no more)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["-o", "parallel.exact=false", "--workers", "1,2"],
            2,
            "fast mode gives the same bits at one number of workers",
        ),
        (["--workers", "1,9"], 78, "--workers 9: in exact mode a step is shared by at most parallel.slices = 4"),
        (["--workers", "two"], 2, "'two' should be numbers with commas"),
        (["--workers", "0"], 2, "give numbers between 1 and"),
        (["--strategy", "ddp,dp"], 2, "'dp' should be one of ddp, fsdp"),
        (["--kills", "-1"], 2, "--kills"),
        (["--workers", "1,2", "--lose", "3"], 2, "--lose: a run of one worker has none to lose"),
        (["--lose", "3", "-o", "parallel.exact=false"], 2, "--lose: only exact mode has the same bits"),
        (["-o", "optim.lr=fast"], 78, "-o optim.lr"),
    ],
)
def test_what_cannot_be_proven_is_refused_at_once(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = prove(tmp_path, *arguments, code=code)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert left_in(tmp_path) == []


def test_a_run_that_fails_by_itself_ends_the_proof_with_its_own_words_and_code(tmp_path: Path) -> None:
    done = prove(tmp_path, "-o", "model.name=nowhere:build", "--steps", "5", code=78)
    assert "nowhere" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert left_in(tmp_path) == []


def test_a_proof_that_is_asked_to_end_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    proof = psutil.Popen(command("--steps", "100000"), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(family := proof.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    proof.send_signal(signal.SIGTERM)
    assert proof.wait(timeout=240) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(family, timeout=480)
    assert alive == []
    assert left_in(tmp_path) == []


def test_a_row_of_the_journal_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    run = DisturbedRun(tmp_path, [])
    assert run.newest_step() == 0
    whole = '{"time": 1.5, "kind": "metrics", "step": 3, "metrics": {"train/loss": 0.5}}\n'
    (tmp_path / "journal.jsonl").write_text(whole + whole.replace("3", "4")[:-20])
    assert run.steps() == [(1.5, 3)]


def test_the_table_says_which_run_differs() -> None:
    run = {"workers": 2, "kills": 1, "steps_repeated": 4, "weights_sha256": "ab" * 32, "optimizer_sha256": "cd" * 32}
    result = {
        "same": False,
        "exact": True,
        "reference": {**run, "kills": 0, "steps": 10},
        "runs": [{**run, "resumed_with": [4, 1], "same": False}],
        "first_difference": {"step": 7, "tensor": None, "metric": "train/loss", "same_until": None},
    }
    table = as_table(result)
    assert "2        4 1           1      4               abababababab  cdcdcdcdcdcd  NO" in table
    assert table.endswith("The first difference is the metric train/loss at step 7.")


def test_what_there_is_one_of_is_said_in_the_singular() -> None:
    run = {"workers": 1, "kills": 1, "steps_repeated": 1, "weights_sha256": "ab" * 32, "optimizer_sha256": "cd" * 32}
    result = {
        "same": True,
        "exact": True,
        "reference": {**run, "kills": 0, "steps": 1},
        "runs": [{**run, "same": True}],
    }
    assert as_table(result).endswith("same bits: 1 step, 1 disturbed run, 1 kill, 1 step repeated")
