"""A checkpoint exists or it does not; reading one runs no code; a damaged one is quarantined."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.checkpoint import (
    CheckpointStore,
    optimizer_from_tensors,
    optimizer_to_tensors,
    read_checkpoint,
    weights_sha256,
    write_checkpoint,
)
from disttrain.errors import ConfigurationError
from disttrain.layout import Best

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.arange(4)}


def state(step: int, accuracy: float | None = None) -> dict[str, Any]:
    metrics = {} if accuracy is None else {"eval/accuracy": accuracy}
    return {"step": step, "recipe": {}, "metrics": metrics}


def save(store: CheckpointStore, step: int, accuracy: float | None = None, value: float = 1.0) -> Path:
    return store.save(tensors(value), {"0.momentum_buffer": torch.ones(2)}, state(step, accuracy))


@pytest.mark.parametrize("folder", ["run", os.fsdecode(b"r\xff")])
def test_what_is_written_is_read(tmp_path: Path, folder: str) -> None:
    """Whatever the folders are called: safetensors takes no path that is not UTF-8."""
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "step-00000003"
    write_checkpoint(path, tensors(2.5), {"0.exp_avg": torch.ones(2)}, state(3))
    checkpoint = read_checkpoint(path)
    assert checkpoint.model["a"].tolist() == [[2.5, 2.5]] * 3
    assert checkpoint.model["b"].dtype == torch.int64
    assert checkpoint.optimizer["0.exp_avg"].tolist() == [1.0, 1.0]
    assert checkpoint.state["step"] == 3
    assert sorted(os.listdir(path)) == FILES
    assert os.listdir(tmp_path / folder) == ["step-00000003"]


def test_a_key_of_an_older_version_is_read_under_its_name_of_today(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    write_checkpoint(path, tensors(), {}, {**state(1), "rests_on": {"device": "cpu"}})
    assert read_checkpoint(path).state == {**state(1), "environment_fingerprint": {"device": "cpu"}}


def test_tied_and_strided_weights_are_stored_by_each_name(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    write_checkpoint(tmp_path / "step-00000001", {"x": shared, "y": shared, "z": shared.T}, {}, state(1))
    model = read_checkpoint(tmp_path / "step-00000001").model
    assert torch.equal(model["x"], shared)
    assert torch.equal(model["y"], shared)
    assert torch.equal(model["z"], shared.T)


def test_plain_pytorch_loads_the_weights(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    write_checkpoint(tmp_path / "step-00000001", network.state_dict(), {}, state(1))
    other = nn.Linear(3, 2)
    other.load_state_dict(load_file(tmp_path / "step-00000001" / "model.safetensors"))
    assert torch.equal(other.weight, network.weight)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def test_safetensors_reads_what_we_write_of_every_type(tmp_path: Path) -> None:
    values = torch.tensor([[0, 1, 1], [1, 0, 1]])
    written = {str(dtype): values.to(dtype) for dtype in DTYPES}
    written |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "ü": torch.ones(1)}
    write_checkpoint(tmp_path / "step-00000001", written, {}, state(1))
    read = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].double(), tensor.double())


def test_a_type_that_no_checkpoint_can_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'w' is torch\.complex128"):
        write_checkpoint(tmp_path / "step-00000001", {"w": torch.zeros(1, dtype=torch.complex128)}, {}, state(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    newest = save(store, 2)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    warnings: list[str] = []
    found = store.newest(warnings.append)
    assert found is not None
    assert found.state["step"] == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert (tmp_path / "step-00000002.damaged").is_dir()
    assert not newest.exists()


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match="not a manifest"):
        read_checkpoint(path)


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=1)
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7), (4, None), (5, 0.6)]:
        save(store, step, accuracy)
    assert [path.name for path in store.paths()] == ["step-00000002", "step-00000004", "step-00000005"]


def test_the_best_are_those_of_the_metric_that_decides(tmp_path: Path) -> None:
    """A small perplexity; one that is not a number is never the best, and a run of before ranks by its accuracy."""

    def kept(best: Best | None) -> list[str]:
        store = CheckpointStore(tmp_path / str(best), keep_last=1, keep_best=1)
        if best is not None:
            store.rank_by(best)
        for step, perplexity, accuracy in [
            (1, 9.0, 0.5),
            (2, 4.0, 0.4),
            (3, math.nan, 0.9),
            (4, 5.0, 0.3),
            (5, 6.0, 0.2),
        ]:
            metrics = {"eval/perplexity": perplexity, "eval/accuracy": accuracy}
            store.save(tensors(), {}, {"step": step, "recipe": {}, "metrics": metrics})
        return [path.name[-1] for path in store.paths()]

    assert kept(Best("perplexity", "min")) == ["2", "5"]
    assert kept(Best("perplexity", "max")) == ["1", "5"]
    assert kept(None) == ["3", "5"]


def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    """A new process finds out before it retires anything: bits may have rotted in one that is not the newest."""
    for step in (1, 2):
        save(CheckpointStore(tmp_path), step)
    rotten = tmp_path / "step-00000002" / "model.safetensors"
    content = bytearray(rotten.read_bytes())
    content[-1] ^= 1
    rotten.write_bytes(content)
    save(CheckpointStore(tmp_path, keep_last=2), 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002.damaged", "step-00000003"]


def test_nothing_is_retired_before_the_newer_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is fsynced before the manifest that vouches for it is made, all of it before it gets its name, and the
    name before an older one goes."""
    order: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(f"{path.name} with manifest: {(path.parent / 'manifest.json').exists()}")

    def noting_rename(path: Path, target: Path) -> Path:
        order.append(f"{path.name} -> {Path(target).name}")
        return rename(path, target)

    def noting_rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            order.append(f"remove {path.name}")
        rmtree(path, ignore_errors=ignore_errors)

    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    save(store, 1)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    monkeypatch.setattr(shutil, "rmtree", noting_rmtree)
    save(store, 2)
    assert order == [
        "model.safetensors with manifest: False",
        "optimizer.safetensors with manifest: False",
        "state.json with manifest: False",
        "manifest.json with manifest: True",
        ".step-00000002.writing with manifest: False",
        ".step-00000002.writing -> step-00000002",
        "checkpoints with manifest: False",
        "step-00000001 -> .step-00000001.retired",
        "remove .step-00000001.retired",
    ]


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, value=1.0)
    path = save(store, 1, accuracy=0.5, value=2.0)
    assert read_checkpoint(path).model["a"][0, 0] == 2.0
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            save(store, step, value=7.0)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").model["a"][0, 0] == 1.0


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / ".step-00000003.writing").mkdir()
    (tmp_path / ".step-00000000.retired").mkdir()
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.replaced")  # killed before the new one stood
    store.clear_unfinished()
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adagrad])
def test_an_optimizer_goes_on_from_its_tensors_as_if_nothing_had_happened(kind: Any, tmp_path: Path) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def start() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        return network, kind(network.parameters(), lr=0.1, **options)

    def steps(network: nn.Linear, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            network(torch.full((2, 4), float(number))).square().mean().backward()
            optimizer.step()

    network, optimizer = start()
    steps(network, optimizer, range(6))
    half, half_optimizer = start()
    steps(half, half_optimizer, range(3))
    saved, rest = optimizer_to_tensors(half_optimizer)
    write_checkpoint(tmp_path / "step-00000003", half.state_dict(), saved, {**state(3), "optimizer": rest})
    checkpoint = read_checkpoint(tmp_path / "step-00000003")
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(checkpoint.model)
    optimizer_from_tensors(resumed_optimizer, checkpoint.optimizer, checkpoint.state["optimizer"])
    steps(resumed, resumed_optimizer, range(3, 6))
    assert weights_sha256(resumed.state_dict()) == weights_sha256(network.state_dict())


def test_an_option_that_the_checkpoint_does_not_know_keeps_its_value() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tensors, rest = optimizer_to_tensors(optimizer)
    del rest["param_groups"][0]["momentum"]
    optimizer_from_tensors(optimizer, tensors, rest)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_another_optimizers_state_is_refused() -> None:
    saved, rest = optimizer_to_tensors(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigurationError, match="does not fit"):
        optimizer_from_tensors(other, saved, rest)


def test_the_hash_changes_with_every_bit_and_name() -> None:
    reference = weights_sha256(tensors())
    assert weights_sha256(dict(reversed(tensors().items()))) == reference
    flipped = tensors()
    flipped["a"].view(torch.int32)[0, 0] ^= 1
    renamed = {"c": tensors()["a"], "b": tensors()["b"]}
    assert len({reference, weights_sha256(flipped), weights_sha256(renamed)}) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.AdamW])
def test_an_optimizers_state_keeps_its_own_types(
    tmp_path: Path, kind: type[torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    """Some of it is in float32 whatever the parameters are in: another type would be other bits after a restart."""

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(3, dtype=dtype)).square().sum().backward()
        optimizer.step()

    model = nn.Linear(3, 2).to(dtype)
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    saved, rest = optimizer_to_tensors(optimizer)
    write_checkpoint(tmp_path / "step-00000003", model.state_dict(), saved, {**state(3), "optimizer": rest})
    checkpoint = read_checkpoint(tmp_path / "step-00000003")
    again = nn.Linear(3, 2).to(dtype)
    again.load_state_dict(checkpoint.model)
    restored = optimizer_of(again)
    optimizer_from_tensors(restored, checkpoint.optimizer, checkpoint.state["optimizer"])
    for _ in range(3):
        step(model, optimizer)
        step(again, restored)
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())
    assert weights_sha256(optimizer_to_tensors(restored)[0]) == weights_sha256(optimizer_to_tensors(optimizer)[0])
