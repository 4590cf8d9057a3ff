"""Each rank writes what it holds of a checkpoint; it exists or does not; any number of workers reads it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from disttrain.checkpoint import (
    Checkpoint,
    CheckpointStore,
    CheckpointWriter,
    Outcome,
    reach,
    read_checkpoint,
    weights_sha256,
    write_checkpoint,
)
from disttrain.checkpoint.handout import hand_out, hand_out_parts, read_by_main
from disttrain.checkpoint.reach import opened_by_all, sharded_store
from disttrain.checkpoint.stored import StoredTensors
from disttrain.distributed.sharded import is_sharded, local, whole
from disttrain.distributed.world import World, join_world
from disttrain.errors import ConfigurationError
from disttrain.layout import MODEL, OPTIMIZER, shard_names
from disttrain.testing import WorkerFailed, faults, workers
from tests.disttrain.checkpoint.test_checkpoint import state
from tests.disttrain.mutations import mutated_json

SHARDED = {"many": (7, 3), "two": (2, 2), "one": (1,), "none": (0, 4), "halves": (5, 2), "even": (6,)}


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    """What is cut (SHARDED) and what each rank has whole."""
    found = {name: value + torch.arange(torch.Size(shape).numel()).view(shape) for name, shape in SHARDED.items()}
    found["halves"] = found["halves"].to(torch.bfloat16)
    return {**found, "buffer": torch.tensor([value, 2.0]), "scalar": torch.tensor(3)}


def in_parts(world: World, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world.size,))
    return {
        name: distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) if name in SHARDED else one
        for name, one in whole.items()
    }


def moments(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"0.step": torch.tensor(9.0), **{f"{name}.exp_avg": one * 2 for name, one in model.items()}}


@contextmanager
def saving(folder: Path, world: World) -> Iterator[Any]:
    """A function that saves the tensors of a value as the checkpoint of a step, and returns what became of it."""
    store = sharded_store(CheckpointStore(folder, keep_last=2), world, 60)
    assert store is not None
    writer = CheckpointWriter(store)

    def save(step: int, value: float) -> Outcome | None:
        model = in_parts(world, tensors(value))
        writer.save(*store.mine(model, moments(model)), state(step))
        return writer.wait()

    yield save
    store.close()
    writer.close()


def save_steps(folder: Path, *steps: int) -> list[Outcome | None]:
    with join_world("cpu", threads=1) as world, saving(folder, world) as save:
        return [save(step, float(step)) for step in steps]


def read_at_any_size(folder: Path, *, out_of_reach: bool) -> bool:
    """Read the newest as parts, and check each; whether it was read from the files by each rank."""
    with join_world("cpu", threads=1) as world:
        store = CheckpointStore(folder)
        read = read_by_main(world, lambda: store.newest(pytest.fail))
        assert read is not None
        if out_of_reach and world.rank == world.size - 1:
            reach.identity_of = lambda _: "another disk"
        opened = opened_by_all(world, read)
        assert opened is None or all(isinstance(one, StoredTensors) for one in (opened.model, opened.optimizer))
        value = float(read.state["step"])
        like = in_parts(world, tensors())
        found = hand_out_parts(world, (opened or read).model, like.get, by_broadcast=opened is None)
        for name, one in tensors(value).items():
            assert is_sharded(found[name]) == (name in SHARDED), name
            assert found[name].dtype == one.dtype
            assert torch.equal(whole(found[name]), one), name
            if is_sharded(found[name]):
                part = local(found[name])
                assert part.untyped_storage().nbytes() == part.nbytes, "nothing holds the whole"
        everywhere = hand_out(world, read.model, tensors())  # as DDP has it
        assert all(torch.equal(everywhere[name], one) for name, one in tensors(value).items())
        return opened is not None


def same(one: Checkpoint, value: float) -> bool:
    return weights_sha256(one.model) == weights_sha256(tensors(value)) and weights_sha256(
        one.optimizer
    ) == weights_sha256(moments(tensors(value)))


def test_each_rank_writes_its_part_and_any_number_of_workers_reads_it(tmp_path: Path) -> None:
    with workers(3, process_group=False) as group:
        first = group.run(save_steps, tmp_path, 1, 2)[0]
    assert [outcome.error for outcome in first] == ["", ""]
    path = tmp_path / "step-00000002"
    names = sorted(one.name for one in path.iterdir())
    assert names == ["manifest.json", *shard_names(MODEL, 3), *shard_names(OPTIMIZER, 3), "state.json"]
    rows = [load_file(path / name).get("many", torch.empty(0)).shape[0] for name in shard_names(MODEL, 3)]
    assert rows == [3, 3, 1], "each its own"
    assert same(read_checkpoint(path), 2.0), "the hash does not depend on how they were cut"
    gathered = tmp_path / "gathered" / "step-00000007"
    write_checkpoint(gathered, tensors(7.0), moments(tensors(7.0)), state(7))
    with workers(2, process_group=False) as group:
        for folder in (tmp_path, gathered.parent):  # older ones, too
            assert group.run(read_at_any_size, folder, out_of_reach=False) == [True, True]
        assert group.run(read_at_any_size, tmp_path, out_of_reach=True) == [False, False]

    file = path / shard_names(OPTIMIZER, 3)[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    warnings: list[str] = []
    found = CheckpointStore(tmp_path).newest(warnings.append)
    assert found is not None
    assert found.state["step"] == 1
    assert same(found, 1.0)
    assert f"{file} is not what was written" in warnings[0]


RANK_0 = ["begun", "tensors", "state", "written", "moved away", "named", "durable", "retired"]
EITHER = ["begun", "model", "optimizer"]
STAGES = [(0, f"checkpoint: {stage}") for stage in RANK_0]
STAGES += [(rank, f"shard: {stage}") for rank in (0, 1) for stage in EITHER] + [(1, "shard: reported")]


def killed_while_saving(folder: Path, rank: int, stage: str) -> None:
    """Save twice, be killed at a stage of the third save, and find a whole checkpoint; then save once more."""
    step = 2 if stage == "checkpoint: moved away" else 3
    fault = faults.kill(rank, at=stage, step=1 if stage == "checkpoint: retired" else step)  # it names the one retired
    with workers(2, faults=[fault], process_group=False) as group, pytest.raises(WorkerFailed):
        group.run(save_steps, folder, 1, 2, step)
    assert fault.happened, stage
    store = CheckpointStore(folder, keep_last=2)
    store.clear_unfinished()
    found = store.newest(pytest.fail)
    assert found is not None
    is_done = stage in ("checkpoint: named", "checkpoint: durable", "checkpoint: retired")
    assert found.state["step"] in ((step,) if is_done else (2,) if rank == 0 else (2, 3)), stage
    assert same(found, float(found.state["step"])), stage


@pytest.mark.parametrize(("rank", "stage"), [(1, "shard: model"), (0, "checkpoint: tensors")])
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path, rank: int, stage: str) -> None:
    killed_while_saving(tmp_path, rank, stage)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("rank", "stage"), STAGES)
def test_a_kill_at_any_stage_at_any_rank_leaves_a_whole_checkpoint(tmp_path: Path, rank: int, stage: str) -> None:
    for number in range(14):  # 210 in all
        killed_while_saving(tmp_path / str(number), rank, stage)


def test_a_rank_that_cannot_write_fails_the_save_and_is_named(tmp_path: Path) -> None:
    full = faults.fail(1, 28, at="shard: model", step=2)
    with workers(2, faults=[full], process_group=False) as group:
        _, second, third = group.run(save_steps, tmp_path, 1, 2, 3)[0]
    assert full.happened
    assert second.path is None
    assert second.error.startswith("rank 1 on ")
    assert "No space left on device" in second.error
    assert third.path is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_rank_that_cannot_reach_the_folder_leaves_the_saving_to_rank_0(tmp_path: Path) -> None:
    def reached(folder: Path) -> bool:
        with join_world("cpu", threads=1) as world:
            here = folder if world.is_main else folder / "elsewhere"
            return sharded_store(CheckpointStore(here), world, 60) is not None

    with workers(2, process_group=False) as group:
        assert group.run(reached, tmp_path) == [False, False]
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    with workers(2, process_group=False) as group:
        group.run(save_steps, tmp_path, 1)
    good, bad, chance = tmp_path / "step-00000001", tmp_path / "step-00000009", random.Random(1)
    num_refused = 0
    for _ in range(150):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        manifest = json.loads((bad / "manifest.json").read_text())
        manifest["tensors"] = mutated_json(manifest["tensors"], chance)
        (bad / "manifest.json").write_text(json.dumps(manifest))
        try:
            found = read_checkpoint(bad)
            assert {name: tuple(one.shape) for name, one in found.model.items()}
        except ConfigurationError as error:
            assert bad.name in str(error)
            num_refused += 1
    assert num_refused > 100
