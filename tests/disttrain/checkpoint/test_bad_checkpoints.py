"""Checkpoints and run directories that something or somebody has changed: each is refused by name, or is the same."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.commands import compare, predict, runs
from disttrain.commands.locate import find_checkpoint, recipe_of, restore_model, task_of, training_set_of
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.recipe import load_recipe
from disttrain.training.given import Given
from disttrain.training.job import Job, build_job
from disttrain.training.resume import resume
from tests.disttrain.mutations import mutated_bytes, mutated_json, mutated_safetensors

FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")
OVERRIDES = (
    "tracking.uri=none", "tracking.system_metrics=false", "train.max_steps=4", "checkpoint.every_steps=2",
    "train.device=cpu", "optim.momentum=0.9", "parallel.exact=true", "data.layout=memory",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with checkpoints at the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("good") / "run"
    disttrain.train(load_recipe("digits", OVERRIDES), run_dir=folder)
    assert [path.name for path in CheckpointStore(folder / "checkpoints").paths()] == ["step-00000002", "step-00000004"]
    return folder


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """What the run trained with, built once."""
    with join_world("cpu") as world:
        yield build_job(load_recipe("digits", OVERRIDES), world, Given())


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def injure(checkpoint: Path, chance: random.Random) -> str:
    """Change one file of a checkpoint; half of the time its manifest is made to fit. Returns what was done."""
    name = chance.choice(FILES)
    path = checkpoint / name
    raw = path.read_bytes()
    if name.endswith(".json") and chance.randrange(4):
        how, changed = "a value", json.dumps(mutated_json(json.loads(raw), chance)).encode()
    elif name.endswith(".safetensors") and chance.randrange(2):
        how, changed = "the header", mutated_safetensors(raw, chance)
    else:
        how, changed = "bytes", mutated_bytes(raw, chance)
    path.write_bytes(changed)
    fits = name != "manifest.json" and chance.randrange(2) == 0
    if fits:
        vouch(checkpoint, name)
    return f"{how} of {name}{', and the manifest fits' if fits else ''}"


def vouch(checkpoint: Path, name: str) -> None:
    """Make the manifest fit the file as it is now."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    raw = (checkpoint / name).read_bytes()
    manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def use(run: Path, job: Job, picture: Path) -> None:
    """Everything that reads a run, in this process. Raises what is not explained to the user."""
    for command, arguments in (
        (runs.command, ["show", str(run), "--json"]),
        (runs.command, ["verify", str(run)]),
        (runs.command, ["hash", str(run)]),
        (predict.command, [str(run), str(picture)]),
        (compare.command, [str(run), str(run)]),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exception is None or isinstance(result.exception, DisttrainError | SystemExit), result.exc_info
        if isinstance(result.exception, DisttrainError):
            assert result.exception.exit_code in (2, 78)
            assert len(str(result.exception)) < 2000
    try:
        found = find_checkpoint(run)
        recipe, train_set = recipe_of(found), training_set_of(found)
        restore_model(found, recipe, task_of(found, recipe, train_set), train_set)
        resume(job, found)
    except ConfigurationError as error:
        assert "step-0000000" in str(error) or "optimizer" in str(error), error
        return
    for parameter in job.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    job.optimizer.step()
    assert isinstance(job.is_finished, bool)


def is_read(checkpoint: Path) -> bool:
    try:
        read_checkpoint(checkpoint)
    except ConfigurationError as error:
        assert checkpoint.name in str(error)
        return False
    return True


def try_mutations(seeds: range, run: Path, job: Job, picture: Path, folder: Path) -> None:
    good = weights_sha256(read_checkpoint(run / "checkpoints/step-00000004").model)
    for seed in seeds:
        copy = folder / f"run-{seed}"
        shutil.copytree(run, copy)
        newest = copy / "checkpoints/step-00000004"
        what = injure(newest, random.Random(seed))
        try:
            before = contents(copy)
            if is_read(newest) or seed % 10 == 0:  # else the one before is used, which is the same each time
                use(copy, job, picture)
            assert contents(copy) == before  # reading changes nothing
            warnings: list[str] = []
            resumed = CheckpointStore(copy / "checkpoints").newest(warnings.append)
            assert resumed is not None
            if warnings:
                assert "step-00000004" in warnings[0]
                assert "Quarantined as step-00000004.damaged" in warnings[0]
                assert resumed.path.name == "step-00000002"
            elif "fits" not in what:
                assert weights_sha256(resumed.model) == good
            for name, raw in contents(run).items():
                if "step-00000004" not in name:
                    assert (copy / name).read_bytes() == raw
        except Exception as error:
            raise AssertionError(f"seed {seed}: {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(copy)


def test_mutated_checkpoints(run: Path, job: Job, picture: Path, tmp_path: Path) -> None:
    try_mutations(range(100), run, job, picture, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_mutated_checkpoints(run: Path, job: Job, picture: Path, tmp_path: Path) -> None:
    try_mutations(range(1000, 8000), run, job, picture, tmp_path)
