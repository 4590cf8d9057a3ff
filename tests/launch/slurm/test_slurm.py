"""`disttrain slurm`: what the batch script says, and what it does when stand-ins for Slurm's commands run it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from disttrain.testing import cluster, hosts, run_workers
from disttrain.testing.hosts import Cluster
from disttrain_launch.cli import main
from disttrain_launch.cli.slurm import _submitted
from disttrain_launch.slurm.script import SlurmJob
from tests.disttrain.parallel.exact_runs import SMALL, outcome, train
from tests.launch.slurm.cases import CASES, GOLDEN, rendered

ROOT = Path(__file__).parents[3]
MODEL = "model.name=tests.disttrain.parallel.exact_runs:build"
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_the_one_that_was_read_and_approved(case: str) -> None:
    """After a change that is meant: `python -m tests.launch.slurm.cases`, and look at the difference."""
    script = rendered(case)
    assert script == (GOLDEN / f"{case}.sh").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


AWKWARD = ["it's", 'a "b"', "$HOME", "`id`", "back\\slash", "two  spaces", "new\nline", "*", "ünïcode", "-o", "a;b&c"]


def test_no_word_is_changed_by_the_shell(tmp_path: Path) -> None:
    """Run with stand-ins that print what they are called with."""
    overrides = tuple(f"data.root={word}" for word in AWKWARD)
    job = SlurmJob("job", "a recipe's.toml", overrides, f"{tmp_path}/run $1", 1, "2", (), 60, 30, 0)
    printer = tmp_path / "disttrain"
    printer.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nSLURM_NODEID=0 exec "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node-0\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    environment["SLURM_JOB_NODELIST"] = "node-0"
    done = subprocess.run(["bash"], input=job.text().encode(), env=environment, capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert words[:2] == ["node", "a recipe's.toml"]
    assert words[2 : 2 + 2 * len(AWKWARD)] == [word for override in overrides for word in ("-o", override)]
    assert words[words.index("--run-dir") + 1] == f"{tmp_path}/run $1"
    assert words[words.index("--rendezvous") + 1] == "node-0:20017"
    assert words[-2:] == ["--node-rank", "0"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["digits", "--time", "soon"], 2, "'soon' is not a time"),
        (["digits", "--mem", "lots"], 2, "'lots' is not an amount of memory"),
        (["digits", "--name", "a b"], 2, "'a b' is not a valid name"),
        (["digits", "-n", "0"], 2, "'0' is not a valid number of workers"),
        (["digits", "--warn", "60", "--stop-grace", "60"], 2, "--stop-grace 60 is not shorter than --warn 60"),
        (["digits", "--sweep", "optim.lr"], 2, "'optim.lr' is not a sweep"),
        (["digits", "--sweep", "optim.lr=1,1"], 2, "'optim.lr=1,1' is not a sweep"),
        (["digits", "--sweep", "optim.lr=0.1,-1"], 78, "optim.lr"),
        (["digits", "--sbatch", "--time=3"], 2, "'--time=3' is not an option of sbatch"),
        (["no-such-recipe"], 78, "no-such-recipe"),
        ([], 2, "Missing argument 'RECIPE'"),
        (["digits", "--nodes", "3", "-n", "2", "-o", "parallel.exact=true"], 78, "at most parallel.slices = 4 workers"),
    ],
)
def test_what_cannot_work_is_refused(arguments: list[str], code: int, says: str) -> None:
    done = CliRunner().invoke(main, ["slurm", "render", *arguments])
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert "Traceback" not in done.output


class Slurm:
    """The stand-ins on PATH."""

    def __init__(self, folder: Path, machines: Cluster | None, nodes: int) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        interpreter = f"#!{sys.executable}\n"
        for name in ("sbatch", "srun", "scontrol"):
            (programs / name).write_text(interpreter + (Path(__file__).parent / "stand_in.py").read_text())
        start = "import sys; from disttrain_launch.cli import main; main(prog_name='disttrain')"
        (programs / "disttrain").write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(start)} "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        (folder / "machines.json").write_text(json.dumps([asdict(machine) for machine in machines or ()]))
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}",
            "STAND_IN_CLUSTER": str(folder),
            "STAND_IN_NODES": str(nodes),
        }

    def disttrain(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "disttrain_launch", "slurm", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=480, check=False)

    @contextmanager
    def job(self) -> Iterator[subprocess.Popen[str]]:
        """A start of the job that was submitted."""
        variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "host-[0-1]"}
        with (self.folder / "job.log").open("a") as log:
            script = str(self.folder / "script")
            job = subprocess.Popen(
                ["bash", script], env=self.environment | variables, stdout=log, stderr=log, text=True, cwd=ROOT
            )
        try:
            yield job
        finally:
            job.kill()
            job.wait()

    def log(self) -> str:
        return (self.folder / "job.log").read_text()

    def requeued(self) -> int:
        return len((self.folder / "requeued").read_text().split()) if (self.folder / "requeued").exists() else 0


def test_a_path_that_is_not_utf8_reaches_slurm_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def sbatch(_command: list[str], *, input: bytes, **_: object) -> subprocess.CompletedProcess[bytes]:
        scripts.append(input)
        return subprocess.CompletedProcess([], 0, b"17\n", b"")

    scripts: list[bytes] = []
    monkeypatch.setattr(subprocess, "run", sbatch)
    assert _submitted(SlurmJob("job", None, (), "/runs/r\udcff", 1, "2", (), 60, 30, 0)) == "17"
    assert b"run_dir='/runs/r\xff'" in scripts[0]


def test_a_job_is_submitted_and_slurms_complaint_is_shown(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, None, 1)
    done = slurm.disttrain("submit", "digits", "--json")
    assert json.loads(done.stdout) == {"job_id": "17", "name": "digits", "run_dir": "runs/digits", "jobs": 1}
    assert (tmp_path / "script").read_text() == slurm.disttrain("submit", "digits", "--dry-run").stdout
    refused = slurm.disttrain("submit", "digits", "--partition", "full")
    assert refused.returncode == 78
    assert refused.stderr.startswith("disttrain: Slurm refused the job: sbatch: error: ")
    assert "Invalid partition name specified" in refused.stderr
    slurm.environment["PATH"] = "/nowhere"
    missing = slurm.disttrain("submit", "digits")
    assert missing.returncode == 78
    assert "sbatch cannot be run here" in missing.stderr


FAKE = """#!/bin/sh
trap 'exit 75' USR1
: > started
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(("to", "requeues"), [("script", True), ("step", False)])
def test_only_a_job_that_was_warned_is_requeued(tmp_path: Path, to: str, requeues: bool) -> None:
    """`disttrain stop`, or scancel's signal to the step, ends it for good."""
    slurm = Slurm(tmp_path, None, 1)
    (tmp_path / "bin" / "disttrain").write_text(FAKE)
    assert slurm.disttrain("submit", "digits").returncode == 0
    started = ROOT / "started"
    try:
        with slurm.job() as job:
            deadline = time.monotonic() + 240
            while not started.exists():
                assert time.monotonic() < deadline, slurm.log()
                time.sleep(0.02)
            if to == "script":
                job.send_signal(signal.SIGUSR1)
            else:
                subprocess.run(["pkill", "-USR1", "-P", str(job.pid)], check=True)
            assert job.wait(timeout=240) == 75, slurm.log()
    finally:
        started.unlink(missing_ok=True)
    assert slurm.requeued() == int(requeues)


@needs_hosts
@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_nodes_are_warned_requeued_and_end_with_the_bits_of_an_undisturbed_run(tmp_path: Path) -> None:
    overrides = (*SMALL, MODEL, "train.epochs=40")
    reference = tmp_path / "reference"
    run_workers(lambda: train(reference, MODEL, "train.epochs=40"), 1, process_group=False, timeout_s=200)
    run_dir = tmp_path / "run"
    with cluster(2) as machines:
        slurm = Slurm(tmp_path, machines, 2)
        words = [word for override in overrides for word in ("-o", override)]
        done = slurm.disttrain("submit", "digits", *words, "--run-dir", str(run_dir), "--nodes", "2", "-n", "1")
        assert done.returncode == 0, done.stderr
        with slurm.job() as job:
            deadline = time.monotonic() + 240
            journal = run_dir / "journal.jsonl"
            while not journal.exists() or journal.read_text().count('"train/loss"') < 5:
                assert time.monotonic() < deadline, slurm.log()
                assert job.poll() is None, slurm.log()
                time.sleep(0.02)
            job.send_signal(signal.SIGUSR1)
            assert job.wait(timeout=480) == 75, slurm.log()
        assert slurm.requeued() == 1
        with slurm.job() as job:
            assert job.wait(timeout=200) == 0, slurm.log()
    assert re.search(r"resuming from step \d+ of 200", slurm.log())
    assert outcome(run_dir) == outcome(reference)
