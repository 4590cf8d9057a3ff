"""Values that are not finite, at one rank of several: stopped at, skipped or replaced, the same way on every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import Checkpoint, CheckpointStore, read_checkpoint, weights_sha256
from disttrain.distributed import later
from disttrain.errors import DivergedError
from disttrain.health import finite
from disttrain.health.finite import QuickCheck, all_finite
from disttrain.health.nonfinite import marked
from disttrain.models.buffers import BufferCopies
from disttrain.recipe import load_recipe
from disttrain.rng import permutation
from disttrain.runs.journal import read_journal
from disttrain.testing import faults, run_workers, workers
from tests.disttrain.parallel.exact_runs import outcome

BATCH = 16
NUM_TRAIN = 64  # four steps an epoch
BASE = (
    f"data.batch_size={BATCH}",
    "data.crop_padding=0",
    "train.epochs=3",
    "train.log_every_steps=1",
    "train.eval_batch_size=8",
    "train.threads=1",
    "train.device=cpu",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=99",
    "tracking.uri=none",
    "tracking.system_metrics=false",
)
EXACT = ("parallel.exact=true", "parallel.slices=4")
MODES: dict[str, tuple[str, ...]] = {"fast": (), "exact": EXACT}


def samples_of(step: int) -> list[int]:
    """The samples of a step, counted from 0, in the order that the workers share them in."""
    epoch, step_in_epoch = divmod(step, NUM_TRAIN // BATCH)
    chosen: list[int] = permutation(0, epoch, NUM_TRAIN)[step_in_epoch * BATCH : (step_in_epoch + 1) * BATCH].tolist()
    return chosen


def data(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose first pixel is the sample's number, so that a model knows them."""
    generator = torch.Generator().manual_seed(num)
    labels = torch.arange(num) % 3
    images = torch.randn((num, 1, 8, 8), generator=generator) + labels.view(-1, 1, 1, 1)
    images[:, 0, 0, 0] = torch.arange(num)
    return images, labels


class Poisoned(nn.Module):
    """Gives something bad for some samples, in training, and in one epoch alone if the recipe's order says so."""

    def __init__(self, samples: list[int], bad: float, backward: bool) -> None:
        super().__init__()
        self.samples, self.bad, self.backward = samples, bad, backward

    def forward(self, features: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        hit = torch.isin(numbers.long(), torch.tensor(self.samples, dtype=torch.int64))
        if not self.training or not hit.any():
            return features
        factor = torch.where(hit, self.bad, 1.0).view(-1, 1, 1, 1).to(features.dtype)
        if self.backward:
            features.register_hook(lambda gradient: gradient * factor)
            return features
        return features * factor


class Network(nn.Module):
    """Convolution, poison, BatchNorm, dropout: everything that has state, behind what goes wrong."""

    def __init__(self, samples: list[int], bad: float = math.nan, *, backward: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.poison = Poisoned(samples, bad, backward)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(120, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        numbers = images[:, 0, 0, 0]
        features = self.norm(self.poison(self.conv(images[:, :, 1:]), numbers))  # without the numbers
        scores: torch.Tensor = self.out(self.drop(features.relu().flatten(1)))
        return scores


def job(run_dir: Path, samples: list[int], *overrides: str, images: torch.Tensor | None = None, **poison: Any) -> None:
    recipe = load_recipe("digits", [*BASE, *overrides])
    own, labels = data(NUM_TRAIN)
    train_set = (own if images is None else images, labels)
    disttrain.train(recipe, run_dir=run_dir, model=Network(samples, **poison), train_set=train_set, test_set=data(30))


def ending(run_dir: Path, samples: list[int], *overrides: str, **options: Any) -> str:
    """Train until it diverges; the message."""
    with pytest.raises(DivergedError) as caught:
        job(run_dir, samples, *overrides, **options)
    return str(caught.value)


def at(run_dir: Path, step: int) -> Checkpoint:
    return read_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}")


def newest_step(run_dir: Path) -> int:
    step: int = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1]).state["step"]
    return step


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    records = read_journal(run_dir / "journal.jsonl")
    return [record for record in records if (record["kind"], record.get("name")) == ("event", name)]


def losses(run_dir: Path) -> dict[int, float]:
    records = [record for record in read_journal(run_dir / "journal.jsonl") if record["kind"] == "metrics"]
    return {r["step"]: float(r["metrics"]["train/loss"]) for r in records if "train/loss" in r["metrics"]}


# Of the third step (2, from 0), and of the second of three workers, in both modes.
VICTIM = samples_of(2)[7]


@pytest.mark.parametrize("mode", MODES)
def test_by_default_the_run_ends_before_the_step_with_the_cause_by_name(tmp_path: Path, mode: str) -> None:
    settings = (*MODES[mode], "checkpoint.every_steps=0")
    messages = run_workers(ending, 3, args=(tmp_path / "bad", [VICTIM], *settings), process_group=False)
    assert len(set(messages)) == 1
    assert messages[0].startswith(
        "the output of 'poison' (Poisoned) is not finite at step 3 (though its input is), first on rank 1, in "
    )
    assert str(VICTIM) in messages[0]
    assert messages[0].endswith(f"The newest checkpoint is {tmp_path}/bad/checkpoints/step-00000002.")
    # Nothing of the step is left, in BatchNorm's statistics neither.
    run_workers(job, 3, args=(tmp_path / "good", [], *settings, "train.max_steps=2"), process_group=False)
    assert weights_sha256(at(tmp_path / "bad", 2).model) == weights_sha256(at(tmp_path / "good", 2).model)
    assert weights_sha256(at(tmp_path / "bad", 2).optimizer) == weights_sha256(at(tmp_path / "good", 2).optimizer)
    assert at(tmp_path / "bad", 2).state["non_finite"] == {"in_a_row": 0, "total": 0}, "the step was not made"
    (event,) = events(tmp_path / "bad", "diverged")
    assert (event["step"], event["epoch"]) == (2, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_leaves_everything_as_it_was(tmp_path: Path, mode: str) -> None:
    settings = (*MODES[mode], "train.non_finite=skip", "train.clip_norm=1.0", "train.accumulate=2")
    run_workers(job, 3, args=(tmp_path, [VICTIM], *settings), process_group=False)
    before, after, later = (at(tmp_path, step) for step in (2, 3, 12))
    assert weights_sha256(before.model) == weights_sha256(after.model)
    assert weights_sha256(before.optimizer) == weights_sha256(after.optimizer)
    assert weights_sha256(after.model) != weights_sha256(later.model)
    assert all_finite([tensor for tensor in later.model.values() if tensor.is_floating_point()])
    assert later.state["finished"]
    assert later.state["non_finite"] == {"in_a_row": 0, "total": 3}  # the sample comes once an epoch
    happened = events(tmp_path, "non-finite")
    assert [event["policy"] for event in happened] == ["skip"] * 3
    assert (happened[0]["step"], happened[0]["rank"]) == (3, 1)
    assert VICTIM in happened[0]["samples"]
    assert set(happened[0]["samples"]) <= set(samples_of(2))
    assert math.isnan(losses(tmp_path)[3])
    assert not math.isnan(losses(tmp_path)[4])


@pytest.mark.parametrize("policy", ["skip", pytest.param("zero", marks=pytest.mark.long)])
def test_every_number_of_workers_gives_the_same_bits_also_after_kills(tmp_path: Path, policy: str) -> None:
    settings = (*EXACT, f"train.non_finite={policy}", "checkpoint.every_steps=2")
    for size in (1, 2, 3, 4):
        run_workers(job, size, args=(tmp_path / str(size), [VICTIM], *settings), process_group=False)
    alone = outcome(tmp_path / "1")
    for size in (2, 3, 4):
        assert repr(outcome(tmp_path / str(size))) == repr(alone)  # as text, where NaN is NaN
    for size, step in ((3, 3), (2, 8)):
        with workers(size, faults=[faults.kill(size - 1, step=step)], process_group=False) as group:
            group.timeout_s = 60
            group.attempt(killed, tmp_path / "killed", [VICTIM], *settings)
    run_workers(job, 4, args=(tmp_path / "killed", [VICTIM], *settings), process_group=False)
    assert repr(outcome(tmp_path / "killed")) == repr(alone)
    assert at(tmp_path / "killed", 12).state["non_finite"] == at(tmp_path / "1", 12).state["non_finite"]


def killed(run_dir: Path, samples: list[int], *overrides: str) -> None:
    """A worker that loses a peer ends, and with it its connections: then no other waits for it."""
    import os

    try:
        job(run_dir, samples, *overrides)
    except RuntimeError:
        os._exit(1)


@pytest.mark.parametrize("mode", MODES)
def test_zeros_in_place_of_what_is_not_finite(tmp_path: Path, mode: str) -> None:
    """In exact mode the other slices' gradients count; in fast mode the sum of all is lost, and momentum goes on."""
    settings = (*MODES[mode], "train.non_finite=zero", "optim.momentum=0.0", "optim.weight_decay=0.0")
    run_workers(job, 3, args=(tmp_path, [VICTIM], *settings), process_group=False)
    before, after = at(tmp_path, 2).model, at(tmp_path, 3).model
    assert torch.equal(before["out.weight"], after["out.weight"]) == (mode == "fast")
    assert all_finite([tensor for tensor in at(tmp_path, 12).model.values() if tensor.is_floating_point()])
    assert [event["policy"] for event in events(tmp_path, "non-finite")] == ["zero"] * 3


def test_the_limit_counts_steps_in_a_row_and_a_kill_does_not_begin_it_anew(tmp_path: Path) -> None:
    bad = [samples_of(step)[0] for step in (0, 1, 2)]
    settings = (*EXACT, "train.non_finite=skip", "train.non_finite_limit=2")
    message = ending(tmp_path / "whole", bad, *settings)
    assert "is not finite at step 3" in message
    assert "in 3 steps in a row (train.non_finite_limit)" in message
    assert newest_step(tmp_path / "whole") == 2
    with workers(1, faults=[faults.kill(0, step=2)], process_group=False) as group:
        group.attempt(job, tmp_path / "killed", bad, *settings)
    assert newest_step(tmp_path / "killed") in (1, 2), "the second was being written"
    assert ending(tmp_path / "killed", bad, *settings) == message.replace("/whole/", "/killed/")
    # One more is allowed: the run goes on, though it has come to an end before.
    job(tmp_path / "killed", bad, *settings, "train.non_finite_limit=3")
    assert newest_step(tmp_path / "killed") == 12


def test_what_is_to_blame_is_named(tmp_path: Path) -> None:
    images = data(NUM_TRAIN)[0]
    images[VICTIM, 0, 4, 4] = math.inf
    message = ending(tmp_path / "image", [], images=images)
    assert message.startswith(f"an image is not finite at step 3, first on rank 0, in sample {VICTIM} of the training")
    assert "fix these samples" in message
    message = ending(tmp_path / "gradient", [VICTIM], backward=True)
    assert message.startswith("the gradient of 'conv.weight' is not finite at step 3 (though the loss is)")
    message = ending(tmp_path / "infinite", [VICTIM], "train.accumulate=4", bad=math.inf)
    assert message.startswith("the output of 'poison' (Poisoned) is not finite at step 3")
    blamed = message.partition("samples ")[2].partition(" of")[0]
    assert blamed == ", ".join(map(str, sorted(samples_of(2)[4:8]))), "all of its micro-batch: BatchNorm mixes them"


def scaled_by(initial: float, run_dir: Path, samples: list[int], *overrides: str, **poison: Any) -> str:
    """As `job` in fp16, with another scale at the start."""
    make = torch.amp.GradScaler.__init__

    def from_there(scaler: Any, *arguments: Any, **options: Any) -> None:
        make(scaler, *arguments, **options, init_scale=initial)

    torch.amp.GradScaler.__init__ = from_there  # type: ignore[method-assign]
    try:
        job(run_dir, samples, "train.precision=fp16", *overrides, **poison)
    except DivergedError as error:
        return str(error)
    finally:
        torch.amp.GradScaler.__init__ = make  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_in_fp16_is_the_scalers_business(tmp_path: Path, mode: str) -> None:
    settings = MODES[mode]
    assert run_workers(scaled_by, 2, args=(2.0**40, tmp_path / "a", [], *settings), process_group=False) == ["", ""]
    assert not events(tmp_path / "a", "non-finite")
    assert at(tmp_path / "a", 12).state["scaler"]["scale"] < 2.0**40
    # A loss that is not finite is none: no scale would help it.
    messages = run_workers(scaled_by, 2, args=(256.0, tmp_path / "b", [VICTIM], *settings), process_group=False)
    assert "the output of 'poison' (Poisoned) is not finite at step 3" in messages[0]
    assert messages[0] == messages[1]
    for policy in ("skip", "zero"):
        arguments = (256.0, tmp_path / policy, [VICTIM], *settings, f"train.non_finite={policy}")
        assert run_workers(scaled_by, 2, args=arguments, process_group=False) == ["", ""]
        assert at(tmp_path / policy, 12).state["scaler"]["scale"] == 256.0
        assert len(events(tmp_path / policy, "non-finite")) == 3


def test_a_gradient_that_no_scale_can_save_ends_the_run(tmp_path: Path) -> None:
    """The scaler halves its scale at each overflow; one that comes at a scale of one is the model's own."""
    message = scaled_by(4.0, tmp_path, samples_of(2) + samples_of(3) + samples_of(0), bad=math.inf, backward=True)
    assert message.startswith("the gradient of 'conv.weight' is not finite at step")
    assert at(tmp_path, newest_step(tmp_path)).state["scaler"]["scale"] == 1.0


def test_a_loss_that_is_not_finite_marks_every_gradient_and_no_other_is_touched() -> None:
    weight = torch.tensor([1.0, -3.0], requires_grad=True)
    for loss, expected in ((weight.sum(), [1.0, 1.0]), (weight.sum() * math.inf, [math.nan, math.nan])):
        weight.grad = None
        loss.backward(marked(torch.tensor(1.0), loss.detach()))  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert str(weight.grad.tolist()) == str(expected)


def test_gradients_of_one_kind_are_looked_at_by_one_call_and_sparse_ones_are_left_to_another() -> None:
    embedding, linear = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1)
    check = QuickCheck.of([*linear.parameters(), *embedding.parameters()])
    assert check is not None
    linear(torch.ones(1, 2)).sum().backward()
    for value, good in ((1.0, True), (math.nan, False), (-0.0, True), (math.inf, False), (3e38, True)):
        linear.weight.grad[0, 1] = value  # type: ignore[index]
        assert check.all_finite() is good, value
        assert str(linear.weight.grad[0, 1].item()) == str(torch.tensor(value).item())  # type: ignore[index]
    linear(embedding(torch.tensor([1]))).sum().backward()
    assert check.all_finite() is None
    assert QuickCheck.of([linear.weight, torch.zeros(1, dtype=torch.float64)]) is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_all_finite_looks_at_every_kind_of_number_and_changes_none(
    device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a GPU's operator does not take, too: here it is the CPU's, which takes no more than that either."""
    operator, has_check = torch._amp_foreach_non_finite_check_and_unscale_, finite._has_check

    def on_device(tensors: list[torch.Tensor], *rest: torch.Tensor) -> None:
        assert device_type == "cpu" or tensors[0].dtype != torch.bfloat16, "not implemented for 'BFloat16'"
        operator(tensors, *rest)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", on_device)
    monkeypatch.setattr(finite, "_has_check", lambda _, dtype: has_check(device_type, dtype))
    tensors = [torch.tensor([3e38, -0.0, 1e-45]), torch.tensor([1e300], dtype=torch.float64), torch.tensor([1 + 2j]),
               torch.tensor([3.3e38, 1.5], dtype=torch.bfloat16), torch.zeros(0),
               torch.zeros(0, dtype=torch.bfloat16)]  # fmt: skip
    before = [tensor.clone() for tensor in tensors]
    assert all_finite(tensors)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
    for index in range(4):
        for bad in (math.nan, math.inf, -math.inf):
            injured = [tensor.clone() for tensor in tensors]
            injured[index][0] = bad
            assert not all_finite(injured)


def test_buffers_of_several_types_are_copied_on_a_gpu_by_a_call_for_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of several types is copied there tensor by tensor: three of each BatchNorm."""
    calls: list[set[torch.dtype]] = []
    copy = torch._foreach_copy_

    def noted(into: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        calls.append({one.dtype for one in (*into, *values)})
        copy(into, values)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    monkeypatch.setattr(later, "is_asynchronous", lambda device: True)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = [buffer.clone() for buffer in model.buffers()]
    copies = BufferCopies(model)
    for is_bad in (0.0, 1.0):
        copies.take()  # the first time there is nothing to copy into
        calls.clear()
        copies.take()
        model(torch.tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 7.0]]))
        assert copies.restore_if(torch.tensor(is_bad))
        assert sorted(map(str, calls)) == ["{torch.float32}"] * 2 + ["{torch.int64}"] * 2
        after = list(model.buffers())
        assert all(torch.equal(*pair) for pair in zip(after, before, strict=True)) is (is_bad == 1)
        before = [buffer.clone() for buffer in after]


def test_buffers_are_put_back_whatever_became_of_them() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("expanded", torch.ones(1).expand(4))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_buffer("nothing", None)
    copies = BufferCopies(model)
    for _ in range(2):
        copies.take()
        model(torch.full((2, 3), math.nan))
        model.mask = torch.zeros(3)
        copies.restore(only_non_finite=True)
        assert model.running_mean is not None
        assert model.running_mean.tolist() == [0, 0, 0]
        assert model.mask.tolist() == [0, 0, 0], "it was finite"
        assert model.num_batches_tracked is not None
        counted = int(model.num_batches_tracked)
        copies.restore()
        assert model.mask.tolist() == [0, -math.inf]
        assert int(model.num_batches_tracked) == counted - 1
        assert model.nothing is None
    copies = BufferCopies(model := nn.BatchNorm1d(3))
    copies.take()
    assert copies.restore_if(torch.zeros(()))
    assert not copies.restore_if(torch.zeros((), device="meta")), "the model has left its buffers elsewhere"
