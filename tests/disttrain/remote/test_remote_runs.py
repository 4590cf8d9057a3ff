"""Whole trainings behind a URL: killed, stopped, and gone on with on another machine, with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import disttrain
from disttrain.errors import DisttrainError, StoppedError
from disttrain.recipe import load_recipe
from disttrain.recipe.address import working_folder
from disttrain.remote import MirroredStore, RemoteRun, verify_behind
from disttrain.testing import faults, run_workers, workers
from tests.disttrain.parallel.exact_runs import Outcome, outcome, train
from tests.disttrain.parallel.test_fsdp_models import FSDP, Odd, Signs, samples
from tests.disttrain.parallel.test_fsdp_models import SMALL as PARTS
from tests.disttrain.remote.test_remote import expire, settle

OFTEN = "checkpoint.every_steps=2"


def train_at(url: str, machine: Path, environment: Mapping[str, str] | None = None) -> None:
    """Train on a machine, which is a folder for what it works on."""
    os.environ.update({"DISTTRAIN_SCRATCH": str(machine), **(environment or {})})
    train(url, OFTEN)  # type: ignore[arg-type]


def train_step_by_step(url: str, machine: Path, environment: Mapping[str, str] | None = None) -> None:
    """The same, with each checkpoint at the URL before the next is saved, however fast or slow this machine is."""
    save = MirroredStore.save

    def patiently(store: MirroredStore, *arguments: Any) -> Path:
        path = save(store, *arguments)
        settle(store)
        return path

    MirroredStore.save = patiently  # type: ignore[method-assign]
    try:
        train_at(url, machine, environment)
    finally:
        MirroredStore.save = save  # type: ignore[method-assign]


# Where four machines die, one after the other: the first or second time that they come to a point.
DEATHS = [("begun", 2), ("tensors", 2), ("committed", 2), ("retired", 1)]


def at_the_url(url: str) -> Outcome:
    """What became of the run, from what is at the URL alone."""
    return outcome(Path(url.removeprefix("file://")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that nobody disturbed, in a plain folder."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_workers(train, 1, args=(run_dir, OFTEN), process_group=False)
    return outcome(run_dir)


def test_a_run_goes_on_from_machine_to_machine_with_the_same_bits(tmp_path: Path, undisturbed: Outcome) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    for number, (point, count) in enumerate(DEATHS):
        fault = faults.kill(0, at=f"mirror: {point}", count=count)
        with workers(1 + number % 2, faults=[fault], process_group=False, check_collectives=False) as group:
            group.attempt(train_step_by_step, url, tmp_path / f"machine-{number}")
        assert fault.happened, point
        expire(url)  # instead of waiting for it to
    run_workers(train_at, 2, args=(url, tmp_path / "last"), process_group=False)
    assert at_the_url(url) == undisturbed
    assert RemoteRun(url).checkpoints().unfinished == []
    assert json.loads(RemoteRun(url).read("lease.json") or b"")["released"]


def stop_after(url: str, machine: Path, step: int) -> str:
    """Train until a signal asks for a stop; what is said then."""
    import disttrain.training.loop as loop

    reached = loop.reached

    def signalling(name: str, **where: int) -> None:
        reached(name, **where)
        if name == "step" and where["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.reached = signalling  # type: ignore[assignment]
    try:
        train_at(url, machine)
    except (StoppedError, DisttrainError) as error:
        return f"{error.exit_code}: {error}"
    finally:
        loop.reached = reached
    return ""


def test_a_stop_is_a_stop_only_when_its_checkpoint_is_there(tmp_path: Path, undisturbed: Outcome) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    with workers(1, process_group=False) as group:
        (said,) = group.run(stop_after, url, tmp_path / "a", 3)
    assert said.startswith("75: ")
    assert f"disttrain train --run-dir {url}" in said
    stopped_at = RemoteRun(url).checkpoints().good[-1]
    assert stopped_at == "step-00000004"
    recipe = RemoteRun(url).read("recipe.toml")
    (tmp_path / "bucket" / "run" / "recipe.toml").unlink()  # which the checkpoint has, too
    run_workers(train_at, 1, args=(url, tmp_path / "b"), process_group=False)
    assert at_the_url(url) == undisturbed
    assert RemoteRun(url).read("recipe.toml") == recipe


def never_arrives(url: str, machine: Path) -> str:
    """Train with a place that takes nothing but small objects; what is said in the end."""
    from disttrain.training import saver

    saver._PATIENCE_S = 0.0
    try:
        train_at(url, machine)
    except DisttrainError as error:
        return f"{error.exit_code}: {error}"
    return ""


def test_training_goes_on_while_nothing_arrives_and_is_not_done_before_it_has(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    fault = faults.fail(None, 5, at="mirror: tensors", times=None)
    with workers(2, faults=[fault], process_group=False) as group:
        said = group.run(never_arrives, url, tmp_path / "a")
    assert [words.partition(":")[0] for words in said] == ["1", "1"], "all workers end alike"
    assert all("start again there" in words for words in said)
    assert RemoteRun(url).checkpoints().good == []
    run_workers(train_at, 1, args=(url, tmp_path / "a"), process_group=False)  # the machine has everything
    assert at_the_url(url) == undisturbed


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command_takes_a_url_and_goes_on_without_a_recipe(tmp_path: Path) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    home.mkdir()

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "disttrain_launch", "train", *arguments, "--run-dir", url],
            cwd=home, env=os.environ | {"DISTTRAIN_SCRATCH": str(scratch)}, capture_output=True, text=True, timeout=480,
        )  # fmt: skip

    nothing = command()
    assert nothing.returncode == 78
    assert "recipe.toml" in nothing.stderr
    quiet = ("-o", "tracking.uri=none", "-o", "train.max_steps=3", "-n", "2")
    first = command("digits", *quiet)
    assert first.returncode == 0, first.stderr
    assert f"run         {url}" in first.stdout
    assert os.listdir(home) == [], "no folder called file:"
    again = command()
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stdout
    logs = Path(url.removeprefix("file://")) / "logs"
    assert sorted(os.listdir(logs)) == ["worker-0.log", "worker-1.log"]
    assert working_folder(url).name == "run"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_mlflow_lacks_of_a_run_behind_a_url_is_delivered(tmp_path: Path) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    run_workers(train_at, 1, args=(url, tmp_path / "a"), process_group=False)
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):
        command = [sys.executable, "-m", "disttrain_launch", "sync", url, "--uri", database]
        done = subprocess.run(command, capture_output=True, text=True, timeout=480, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"has everything of {url}" in done.stdout
    assert json.loads(RemoteRun(url).read("mlflow.json") or b"{}")["run_id"]


def train_in_parts(url: str, machine: Path, *overrides: str) -> float:
    """Train a model in shards on a machine; the loss of the end."""
    os.environ["DISTTRAIN_SCRATCH"] = str(machine)
    sets = {"train_set": samples(20, 1), "test_set": samples(10, 2)}
    recipe = load_recipe("digits", [*PARTS, "train.non_finite=skip", *overrides])
    return disttrain.train(recipe, run_dir=url, model=Odd, task=Signs, **sets).loss


def test_parts_of_a_checkpoint_travel_like_any_file_and_another_machine_resumes_them(tmp_path: Path) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    run_workers(train_in_parts, 2, args=(url, tmp_path / "one", "train.max_steps=3", FSDP), process_group=False)
    *_, name = RemoteRun(url).checkpoints().good
    assert f"checkpoints/{name}/optimizer.rank-00001.safetensors" in RemoteRun(url).objects("checkpoints")
    assert all(one["good"] for one in verify_behind(url)[0])
    losses = run_workers(train_in_parts, 2, args=(url, tmp_path / "another", FSDP), process_group=False)
    losses += run_workers(train_in_parts, 2, args=(str(tmp_path / "whole"), tmp_path, FSDP), process_group=False)
    assert len(set(losses)) == 1, "as if it had not moved"
