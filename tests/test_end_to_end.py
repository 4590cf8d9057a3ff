"""What a user does, with the real launchers: start, interrupt, go on, and get the weights of the undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.recipe import load_recipe
from disttrain.testing import run_workers

RECIPE = ["digits", "-o", "tracking.uri=none", "-o", "train.epochs=10"]  # of 23 steps
LAUNCH = [sys.executable, "-m", "disttrain_launch", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "disttrain"]


class Machine:
    """A folder, a TMPDIR and a mark in the environment, by which whatever is left over can be found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.temporary), "DISTTRAIN_TEST_MARK": self.mark}

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
        )

    def run_to_the_end(self, *command: str) -> tuple[int, str, str]:
        process = self.start(*command)
        out, err = process.communicate(timeout=150)
        return process.returncode, out, err

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Wait until the journal has a row of `step` or later."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            journal = self.run / "journal.jsonl"
            if journal.exists() and f'"step": {step},' in journal.read_text():
                return
            time.sleep(0.02)
        raise TimeoutError(f"no step {step}")

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DISTTRAIN_TEST_MARK") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def is_clean(self) -> bool:
        """No process of ours, no temporary file; waits a little for processes that are just ending."""
        deadline = time.monotonic() + 480
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        hidden = list(self.run.rglob(".*")) if self.run.exists() else []
        left = [path for path in self.temporary.rglob("*") if path.is_file()]
        assert not self.processes()
        assert not hidden
        assert not left
        return True

    def sha256(self) -> tuple[str, str]:
        checkpoint = read_checkpoint(CheckpointStore(self.run / "checkpoints").paths()[-1])
        return weights_sha256(checkpoint.model), weights_sha256(checkpoint.optimizer)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for process in machine.processes():
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The hashes of the run that nobody disturbed, by two warm workers."""
    machine = Machine(tmp_path_factory.mktemp("undisturbed"))
    recipe = load_recipe(RECIPE[0], RECIPE[2::2])
    run_workers(lambda: disttrain.train(recipe, run_dir=machine.run), 2, process_group=False)
    return machine.sha256()


@pytest.mark.parametrize("whom", ["launcher", pytest.param("worker", marks=pytest.mark.long)])
def test_a_run_that_is_stopped_and_killed_is_resumed_by_torchrun_and_has_the_weights_of_the_undisturbed_one(
    machine: Machine, undisturbed: tuple[str, str], whom: str
) -> None:
    process = machine.start(*LAUNCH, *RECIPE, "-n", "2", "--run-dir", "run", "-o", "checkpoint.every_steps=10")
    machine.wait_for_step(20, process)
    if whom == "launcher":
        process.send_signal(signal.SIGINT)
    else:
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
        ranks["1"].send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 75, out + err
    assert out.startswith("starting 2 workers…\n")
    assert f"the checkpoint is saved. Resume with: disttrain train -n 2 --run-dir {machine.run}\n" in err
    assert err.startswith("disttrain: Ctrl-C: ") or whom == "worker"
    assert not any(name in err for name in ("SIGINT", "SIGTERM"))
    assert "Traceback" not in out + err
    assert machine.is_clean()
    process = machine.start(*LAUNCH, "--run-dir", "run", "-n", "2", "-o", "tracking.uri=none")
    machine.wait_for_step(100, process)
    process.kill()  # the launcher alone: its workers end with it
    process.communicate(timeout=240)
    deadline = time.monotonic() + 480
    while machine.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not machine.processes()
    code, out, err = machine.run_to_the_end(*TORCHRUN, *RECIPE, "--run-dir", "run")
    assert code == 0, out + err
    assert "resuming from step" in out
    assert out.count("done in") == 1, "only rank 0 speaks"
    assert machine.sha256() == undisturbed
    assert (machine.run / "logs" / "worker-1.log").is_file()
    assert machine.is_clean()


def test_a_worker_that_dies_ends_the_run_and_is_named(machine: Machine) -> None:
    process = machine.start(*LAUNCH, *RECIPE, "-n", "2", "--run-dir", "run")
    machine.wait_for_step(20, process)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, out + err
    assert "rank 1" in err
    assert "SIGKILL" in err
    assert "Traceback" not in err
    assert machine.is_clean()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-o", "optim.lr=-1"], 78, "optim.lr"),
        (["-o", "model.name=nothing.at.all:build"], 78, "model.name"),
        pytest.param(["-o", "parallel.strategy=none"], 78, "parallel.strategy", marks=pytest.mark.long),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_message(
    machine: Machine, options: list[str], code: int, message: str
) -> None:
    found, out, err = machine.run_to_the_end(*LAUNCH, *RECIPE, "-n", "2", "--run-dir", "run", *options)
    assert found == code, out + err
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2
    assert machine.is_clean()
