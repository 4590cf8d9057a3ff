"""Machines that share no folder each bring their part of a checkpoint to the URL; the manifest comes last."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from disttrain.checkpoint import (
    CheckpointStore,
    CheckpointWriter,
    Outcome,
    reach,
    read_checkpoint,
    weights_sha256,
    write_checkpoint,
)
from disttrain.checkpoint.reach import sharded_store
from disttrain.distributed.world import join_world
from disttrain.layout import MODEL, OPTIMIZER, shard_names
from disttrain.remote import Brought, RemoteRun, local_copy
from disttrain.testing import WorkerFailed, faults, run_workers, workers
from disttrain.training import session
from tests.disttrain.checkpoint.test_checkpoint import state
from tests.disttrain.checkpoint.test_shards import in_parts, moments, same, tensors
from tests.disttrain.parallel.test_fsdp_models import FSDP, Odd, train
from tests.disttrain.remote.test_remote import machine, settle


def save_values(url: str, root: Path, *values: float) -> list[Outcome | None]:
    """Save tensors of these values, whose whole parts are the steps, each rank on a machine of its own."""
    with join_world("cpu", threads=1) as world, ExitStack() as until_the_end:
        here = root / f"machine-{world.rank}"
        store = CheckpointStore(here / "checkpoints")
        if world.is_main:
            store = until_the_end.enter_context(machine(url, here))
        shards = sharded_store(store, world, 60, Brought(url, store))
        assert shards is not None
        writer = CheckpointWriter(shards)
        outcomes = []
        for value in values:
            model = in_parts(world, tensors(value))
            writer.save(*shards.mine(model, moments(model)), state(int(value)))
            outcomes.append(writer.wait())
            if world.is_main:
                settle(store)  # type: ignore[arg-type]
        shards.close()
        writer.close()
        return outcomes


def test_each_machine_brings_its_part_and_another_one_reads_it(tmp_path: Path) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    left = tmp_path / "machine-1" / "checkpoints" / ".step-rank-7.writing"  # by a killed job of more workers
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"much")
    full = faults.fail(1, 28, at="shard: brought", step=2)
    with workers(2, faults=[full], process_group=False) as group:
        first, second, third, again = group.run(save_values, url, tmp_path, 1.0, 2.0, 3.0, 3.5)[0]
    assert full.happened
    assert second.path is None
    assert second.error.startswith("rank 1 on ")
    assert [one.error for one in (first, third, again)] == ["", "", ""]
    there = RemoteRun(url).checkpoints()
    assert (there.good, there.unfinished) == (["step-00000001", "step-00000003.2"], [])
    assert not [path for path in (tmp_path / "machine-1").rglob("*") if path.is_file()], "it has nothing left to keep"
    local = tmp_path / "machine-0" / "checkpoints" / "step-00000003"
    theirs = [shard_names(file, 2)[1] for file in (MODEL, OPTIMIZER)]
    assert not [name for name in theirs if (local / name).exists()], "nothing has gone by way of rank 0"

    for folder in (tmp_path / "machine-0", tmp_path / "new"):  # the next start, there and elsewhere
        with machine(url, folder) as store:
            found = store.newest(lambda warning: None)
            assert found is not None
            assert found.state["step"] == 3
            assert same(found, 3.5)


def test_a_step_that_is_saved_again_at_once_has_a_name_of_its_own_under_which_it_is_uploaded(tmp_path: Path) -> None:
    """The parts of the second are brought while the manifest of the first may be on its way."""
    run = RemoteRun((tmp_path / "bucket" / "run").as_uri())
    with machine(run.url, tmp_path / "here") as store:
        names = [Brought(run.url, store).reserve("step-00000003") for _ in range(2)]
        assert names == ["step-00000003", "step-00000003.2"]
        write_checkpoint(store.folder / "step-00000003", tensors(3.0), moments(tensors(3.0)), state(3))
        settle(store)
        assert run.checkpoints().good == [names[1]]
        Brought(run.url, store).reserve("step-00000003")  # for a save that fails
        settle(store)
        assert run.checkpoints().good == [names[1]], "it would be brought again, without what other machines have"


def test_where_a_machine_may_not_write_to_the_url_rank_0_collects_what_it_has(tmp_path: Path) -> None:
    def is_collected() -> bool:
        url = (tmp_path / "bucket" / "run").as_uri()
        with join_world("cpu", threads=1) as world:
            store = CheckpointStore(tmp_path / f"machine-{world.rank}" / "checkpoints")
            here = url if world.is_main else f"{url}/file"
            (tmp_path / "bucket" / "run").mkdir(parents=True, exist_ok=True)
            (tmp_path / "bucket" / "run" / "file").touch()  # what is below it cannot be
            return sharded_store(store, world, 60, Brought(here, store)) is None

    assert run_workers(is_collected, 2, process_group=False) == [True, True]


@pytest.mark.long
@pytest.mark.parametrize(
    ("rank", "stage"),
    [(1, "shard: model"), (1, "shard: brought"), (0, "checkpoint: tensors"), (0, "checkpoint: durable")],
)
def test_a_kill_while_parts_are_brought_leaves_the_checkpoint_before(tmp_path: Path, rank: int, stage: str) -> None:
    url = (tmp_path / "bucket" / "run").as_uri()
    fault = faults.kill(rank, at=stage, step=2)
    with workers(2, faults=[fault], process_group=False) as group, pytest.raises(WorkerFailed):
        group.run(save_values, url, tmp_path, 1.0, 2.0)
    assert fault.happened
    with machine(url, tmp_path / "machine-0") as store:
        found = store.newest(lambda warning: None)
        assert found is not None
        assert same(found, float(found.state["step"]))
        assert RemoteRun(url).checkpoints().unfinished == []
    with workers(2, process_group=False) as group:
        assert [outcome.error for outcome in group.run(save_values, url, tmp_path, 3.0)[0] if outcome] == [""]


def train_apart(run_dir: str, scratch: str, *overrides: str) -> None:
    """Train with each rank on a machine of its own: neither reaches the other's working folder."""
    os.environ["DISTTRAIN_SCRATCH"] = scratch
    if os.environ["RANK"] == "1":
        session.CheckpointStore = lambda folder, **keep: CheckpointStore(folder.parent / "other", **keep)  # type: ignore[attr-defined, assignment, misc]
        reach.identity_of = lambda _: "another disk"
    train(run_dir, Odd, FSDP, "train.non_finite=skip", *overrides)  # type: ignore[arg-type]


@pytest.mark.long
def test_machines_that_share_no_folder_stop_and_resume_a_sharded_run_behind_a_url(tmp_path: Path) -> None:
    """The last checkpoint is tried again where a machine fails to bring its part."""
    hashes = []
    for name, stops in (("undisturbed", [()]), ("stopped", [("train.max_steps=3",), ()])):
        url = (tmp_path / name / "run").as_uri()
        for overrides in stops:
            fault = faults.fail(1, 28, at="shard: brought", step=3 if overrides else 6)
            with workers(2, faults=[fault], process_group=False) as group:
                group.run(train_apart, url, str(tmp_path / name / "scratch"), *overrides)
            assert fault.happened
        with local_copy(url, "newest") as found:
            hashes.append(weights_sha256(read_checkpoint(CheckpointStore(found / "checkpoints").paths()[-1]).model))
    assert hashes[0] == hashes[1]
    (local,) = (tmp_path / "stopped" / "scratch").glob("*/run/checkpoints")
    assert not (local / "step-00000006" / shard_names(MODEL, 2)[1]).exists(), "nothing has gone by way of rank 0"
