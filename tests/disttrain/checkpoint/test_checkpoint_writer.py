"""Saving beside the training: what is written is what was there when it was asked for, whatever goes on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.checkpoint import CheckpointStore, CheckpointWriter, Outcome, optimizer_to_tensors, read_checkpoint
from disttrain.checkpoint.snapshot import Snapshot
from disttrain.checkpoint.tensors import Tensors
from disttrain.testing import workers
from tests.disttrain.checkpoint.test_checkpoint import state, tensors


class SlowStore(CheckpointStore):
    """Writes when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Path:
        self.begun.set()
        assert self.go_on.wait(60)
        return super().save(model, optimizer, state)


def test_a_checkpoint_written_beside_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    writer = CheckpointWriter(store)
    weights, momentum = tensors(1.0), {"0.momentum_buffer": torch.ones(2)}
    assert writer.save(weights, momentum, state(1)) is None
    assert store.begun.wait(60)
    assert writer.poll() is None, "it is being written"
    weights["a"].fill_(7.0)  # training goes on
    momentum["0.momentum_buffer"].fill_(7.0)
    store.go_on.set()
    outcome = writer.wait()
    assert outcome is not None
    assert outcome.path == tmp_path / "step-00000001"
    assert writer.wait() is None, "told once"
    checkpoint = read_checkpoint(outcome.path)
    assert torch.equal(checkpoint.model["a"], torch.ones(3, 2))
    assert torch.equal(checkpoint.optimizer["0.momentum_buffer"], torch.ones(2))
    writer.close()


def test_one_checkpoint_is_written_at_a_time_and_the_next_waits(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    writer = CheckpointWriter(store)
    writer.save(tensors(1.0), {}, state(1))
    threading.Timer(0.3, store.go_on.set).start()
    begin = time.monotonic()
    before = writer.save(tensors(2.0), {}, state(2))
    assert time.monotonic() - begin > 0.2
    assert before is not None
    assert before.step == 1
    assert before.waited_s == 0
    second_outcome = writer.wait()
    assert second_outcome is not None
    assert second_outcome.waited_s > 0.2
    writer.close()
    first, second = (read_checkpoint(tmp_path / f"step-0000000{step}").model["a"][0, 0].item() for step in (1, 2))
    assert (first, second) == (1.0, 2.0)


def test_what_is_saved_may_change_its_tensors_from_save_to_save(tmp_path: Path) -> None:
    """An optimizer has no state before its first step; tied weights and buffers are as they come."""
    store = CheckpointStore(tmp_path, keep_last=9)
    writer = CheckpointWriter(store)
    shared = torch.arange(6.0).view(2, 3)
    writer.save({"a": torch.ones(2), "b": shared, "c": shared}, {}, state(1))
    writer.save({"a": torch.ones(3), "b": shared.T}, {"0.exp_avg": torch.zeros(2)}, state(2))
    writer.close()
    assert read_checkpoint(tmp_path / "step-00000001").model.keys() == {"a", "b", "c"}
    second = read_checkpoint(tmp_path / "step-00000002")
    assert {name: tuple(tensor.shape) for name, tensor in second.model.items()} == {"a": (3,), "b": (3, 2)}
    assert torch.equal(second.model["b"], shared.T)
    assert second.optimizer.keys() == {"0.exp_avg"}


def test_a_save_that_fails_beside_is_told_with_its_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    writer = CheckpointWriter(CheckpointStore(tmp_path / "checkpoints"))
    writer.save(tensors(), {}, state(4))
    outcome = writer.wait()
    writer.close()
    assert outcome is not None
    assert (outcome.step, outcome.path) == (4, None)
    assert "checkpoints" in outcome.error


def peak_above_now(action: Callable[[], object]) -> int:
    """How far the memory of this process rises while `action` runs, in bytes."""

    def of_this_process(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = of_this_process("VmRSS:")
    action()
    return of_this_process("VmHWM:") - before


def peaks_of_two_saves(folder: Path, num_floats: int) -> list[int]:
    writer = CheckpointWriter(CheckpointStore(folder))

    def save(step: int, weights: Tensors) -> None:
        writer.save(weights, {}, state(step))
        writer.wait()

    save(0, {"few": torch.ones(8)})  # whatever is loaded once
    weights = {"a": torch.ones(num_floats // 2), "b": torch.ones(num_floats // 2)}
    peaks = [peak_above_now(partial(save, step, weights)) for step in (1, 2)]
    writer.close()
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory peaks are read from /proc")
def test_a_save_takes_one_copy_and_the_next_the_same_one(tmp_path: Path) -> None:
    size = 64 * 2**20
    with workers(1, process_group=False) as group:
        ((first, second),) = group.run(peaks_of_two_saves, tmp_path, size // 4)
    assert first < 1.25 * size
    assert second < 0.25 * size


def test_a_gpu_copies_on_a_stream_of_its_own_and_waits_only_for_what_may_change_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of what it is given, noted by streams and tensors that are made up."""
    noted: list[str] = []

    class Stream:
        device = None

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            noted.append(f"{self.name} waits for {other.name}")

        def __str__(self) -> str:
            return self.name

    def event() -> Any:
        return SimpleNamespace(
            record=lambda stream: noted.append(f"mark on {stream}"), synchronize=lambda: noted.append("host waits")
        )

    def pair(name: str) -> Any:
        copy = SimpleNamespace(copy_=lambda original, non_blocking: noted.append(f"copy {name}"))
        original = SimpleNamespace(device=None, record_stream=lambda stream: noted.append(f"keep {name} for {stream}"))
        return copy, original

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", event)
    snapshot = Snapshot()
    snapshot._copy_on_gpu([pair("buffer")], [pair("weight")])
    snapshot.copy_the_rest()
    assert noted == [
        "side waits for main", "copy buffer", "keep buffer for side", "main waits for side",
        "copy weight", "keep weight for side", "mark on side", "host waits",
    ]  # fmt: skip


class Clipping(nn.Linear):
    """Changes its own weights in its forward pass, if it is told how."""

    def __init__(self, how: str) -> None:
        super().__init__(4, 3)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "in place":
            with torch.no_grad():
                self.weight.mul_(0.5)
        elif self.how == "behind autograd's back":
            self.weight.data.mul_(0.5)
        return super().forward(x)


class Loop:
    """A training loop as a run monitor sees it: a step, then perhaps a checkpoint."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.writer = CheckpointWriter(CheckpointStore(folder, keep_last=9), self.optimizer)
        self.number = 0

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.full((2, 4), float(self.number))).square().sum().backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.number += 1

    def save(self) -> tuple[Outcome | None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Begin a checkpoint; what became of the one before, and what the new one must hold."""
        moments, rest = optimizer_to_tensors(self.optimizer)
        weights = self.model.state_dict()
        there = {name: tensor.clone() for name, tensor in weights.items()}, {k: v.clone() for k, v in moments.items()}
        return self.writer.save(weights, moments, {**state(self.number), "optimizer": rest}), *there


def assert_holds(path: Path, weights: Tensors, moments: Tensors) -> None:
    checkpoint = read_checkpoint(path)
    for found, expected in ((checkpoint.model, weights), (checkpoint.optimizer, moments)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_copy_runs_beside_the_next_forward_pass_and_the_optimizer_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, copied_late = threading.Event(), []
    copy_the_rest = Snapshot.copy_the_rest

    def late(self: Snapshot) -> None:
        assert go_on.wait(60)
        copy_the_rest(self)
        copied_late.append(True)

    loop = Loop(tmp_path, nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    loop.step()
    loop.save()  # the first is copied at once, and compared
    loop.step()
    monkeypatch.setattr(Snapshot, "copy_the_rest", late)
    _, weights, moments = loop.save()
    loop.forward_backward()  # changes BatchNorm's statistics, which were copied at once
    assert not copied_late, "the forward and backward pass did not wait"
    threading.Timer(0.2, go_on.set).start()
    loop.optimizer.step()
    assert copied_late, "the step would have changed what was being copied"
    loop.number += 1
    for _ in range(3):
        loop.step()
    outcome = loop.writer.wait()
    assert outcome is not None
    assert outcome.path == tmp_path / "step-00000002"
    assert_holds(outcome.path, weights, moments)
    loop.writer.close()


@pytest.mark.parametrize("how", ["in place", "behind autograd's back"])
def test_a_model_that_changes_its_own_weights_is_saved_as_it_was(tmp_path: Path, how: str) -> None:
    loop = Loop(tmp_path, Clipping(how))
    loop.step()
    for number in range(3):
        _, weights, moments = loop.save()
        loop.step()
        outcome = loop.writer.wait()
        assert outcome is not None
        assert outcome.path == tmp_path / f"step-{number + 1:08d}"
        assert_holds(outcome.path, weights, moments)
    loop.writer.close()


def test_a_model_that_begins_to_change_its_weights_is_never_saved_torn(tmp_path: Path) -> None:
    model = Clipping("not at all")
    loop = Loop(tmp_path, model)
    loop.step()
    loop.save()
    loop.step()
    model.how = "in place"
    loop.save()
    loop.step()
    spoilt, weights, moments = loop.save()
    loop.step()
    last = loop.writer.wait()
    loop.writer.close()
    assert spoilt is not None
    assert spoilt.path is None
    assert "'weight'" in spoilt.error
    assert last is not None
    assert last.path is not None
    assert_holds(last.path, weights, moments)


def test_a_run_that_fails_in_its_forward_pass_leaves_no_torn_checkpoint(tmp_path: Path) -> None:
    model = Clipping("not at all")
    loop = Loop(tmp_path / "checkpoints", model)
    loop.step()
    loop.save()
    loop.step()
    loop.writer.wait()
    model.how = "in place"
    loop.save()
    loop.forward_backward()  # and then something is raised: the optimizer makes no step
    outcome = loop.writer.wait()
    loop.writer.close()
    assert outcome is not None
    assert outcome.path is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_closed_writer_has_let_go_of_the_optimizer(tmp_path: Path) -> None:
    loop = Loop(tmp_path, nn.Linear(4, 3))
    loop.step()
    _, weights, moments = loop.save()
    loop.writer.close()
    assert_holds(tmp_path / "step-00000001", weights, moments)
    loop.step()
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_what_another_process_did_not_write_is_written_from_the_copies(tmp_path: Path) -> None:
    """Two at most: the other begins a save once it has written the one before."""
    store = CheckpointStore(tmp_path, keep_last=9)
    writer = CheckpointWriter(store)
    writer.find = store.find
    weights = tensors(0.0)
    for step in (1, 2, 3):
        weights["a"].fill_(float(step))
        writer.save(weights, {}, state(step))
        if step == 1:
            assert writer.wait() is None, "nothing is written"
            store.save(weights, {}, state(step))  # by the other one
    weights["a"].fill_(9.0)
    assert writer.kept == [(2, False), (3, False)]
    assert [outcome.path for outcome in writer.take_over()] == [tmp_path / "step-00000002"]
    last = writer.wait()
    assert last is not None
    assert last.path == tmp_path / "step-00000003"
    for path in store.paths():
        assert torch.equal(read_checkpoint(path).model["a"], torch.full((3, 2), float(str(path)[-1])))
    writer.save(weights, {}, state(4))
    assert writer.wait() is not None, "from now on, all is written"
    writer.close()
