"""Memory that is not there. The machine's own: no GPU is at hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import disttrain
from disttrain.errors import DisttrainError, is_lost_peer, is_out_of_memory
from disttrain.testing import run_workers
from disttrain.training import fitting
from disttrain.training.shortage import _asked
from tests.disttrain.task.test_users_tasks import QUIET
from tests.disttrain.task.users import Regression, case

MORE_THAN_THERE_IS = 2**50  # numbers, of 4 bytes
TRIED = 4  # so many samples at most are tried before training


class Hungry(Regression):
    """Asks for more than there is, for a large batch, from a call on."""

    def __init__(self, method: str, first: int) -> None:
        self.method, self.calls, self.first = method, 0, first

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        self._eat("loss", batch)
        return super().loss(model, batch)

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        self._eat("score", batch)
        return super().score(model, batch)

    def _eat(self, method: str, batch: Any) -> None:
        if method == self.method and len(batch[0]) > TRIED:
            self.calls += 1
            if self.calls >= self.first:
                torch.empty(MORE_THAN_THERE_IS)


@pytest.mark.parametrize(
    ("method", "first", "overrides", "code", "says"),
    [
        (
            "loss",
            1,
            [],
            78,
            "step 1, with 16 samples computed at once: {} begin a new run with train.accumulate = 2, which computes 8 ",
        ),
        (
            "loss",
            2,
            ["train.accumulate=2"],
            78,
            "step 1, with 8 samples computed at once: {} begin a new run with train.accumulate = 4",
        ),
        ("loss", 2, [], 1, "step 2, with 16 samples computed at once: {} begin a new run with train.accumulate = 2,"),
        (
            "score",
            1,
            [],
            1,
            "the evaluation at step 3, with train.eval_batch_size = 64: {} resume with train.eval_batch_size = 5 (",
        ),
    ],
)
def test_what_takes_less_memory_is_named(
    tmp_path: Path, method: str, first: int, overrides: list[str], code: int, says: str
) -> None:
    """Where a retry would fail again, at the first step, it is exit 78."""
    one = case("regression")
    size = "train.eval_batch_size=64"
    with pytest.raises(DisttrainError) as caught:
        disttrain.train(
            QUIET,
            overrides=["data.batch_size=16", "train.epochs=1", size, *overrides],
            run_dir=tmp_path / "run",
            task=Hungry(method, first),
            model=one.model,
            train_set=one.train_set,
            test_set=one.test_set,
        )
    said = says.format("4,194,304.00 GiB could not be allocated on cpu;")
    assert str(caught.value).startswith(f"out of memory in {said}")
    assert caught.value.exit_code == code
    assert "DefaultCPUAllocator" in (tmp_path / "run/logs/worker-0.log").read_text()


class Small(nn.Module):
    """Stands for a GPU, whose memory holds `most` samples at once; fewer than `least` raise `error`.

    If it is not full yet, it is from the first batch that is larger than those which are tried before training.
    """

    calls: torch.Tensor

    def __init__(
        self, most: int, *, least: int = 1, is_full: bool = True, error: type[BaseException] = ValueError
    ) -> None:
        super().__init__()
        self.error = error
        self.inner, self.most, self.least, self.is_full = case("regression").model, most, least, is_full
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features: torch.Tensor) -> Any:
        self.is_full |= len(features) > TRIED
        if self.is_full and len(features) < self.least:
            raise self.error("too few")
        if self.is_full and len(features) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
        self.calls += self.training
        return self.inner(features)


def trained(run_dir: Path, model: nn.Module, *overrides: str) -> disttrain.Result:
    one = case("regression")
    words = ["data.batch_size=32", "train.epochs=1", "train.eval_batch_size=2", *overrides]
    sets = {"train_set": one.train_set, "test_set": one.test_set}
    return disttrain.train(QUIET, overrides=words, run_dir=run_dir, task=one.task, model=model, **sets)


def why(run_dir: Path, model: nn.Module, *overrides: str) -> str:
    with pytest.raises(DisttrainError) as caught:
        trained(run_dir, model, *overrides)
    assert not (run_dir / "checkpoints").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("most", "overrides", "named"),
    [
        (5, [], "train.accumulate = 8, which computes 4 at once"),
        (5, ["train.accumulate=3"], "train.accumulate = 12, which computes 3 at once"),
        (4, ["parallel.exact=true"], "train.accumulate = 2, which computes 4 at once"),
        (4, ["optim.name=adamw", "train.precision=bf16"], "train.accumulate = 8, which computes 4 at once"),
    ],
)
def test_the_accumulate_that_is_named_fits(tmp_path: Path, most: int, overrides: list[str], named: str) -> None:
    """And nothing is left of what was tried: the model is as it was, and no checkpoint is written."""
    model = Small(most)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = why(tmp_path / "run", model, *overrides)
    assert said.startswith("out of memory in step 1, with "), said
    assert said.endswith(f"begin a new run with {named} and fits (tried on this worker)."), said
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fits = f"train.accumulate={named.split()[2].rstrip(',')}"
    assert trained(tmp_path / "again", model, *overrides, fits).step == 2


def test_where_no_accumulate_fits_other_ways_are_named(tmp_path: Path) -> None:
    """Where a single sample is too much; and where two are, and the model cannot compute one, as with BatchNorm."""
    ways = "take a smaller model, smaller samples or train.precision = 'bf16'."
    for model in (Small(0, is_full=False), Small(1, least=2, is_full=False)):
        said = why(tmp_path / str(model.least), model)
        assert said.endswith(f"; no larger train.accumulate fits (tried on this worker): {ways}"), said


def test_where_the_model_cannot_compute_so_few_one_in_between_is_named(tmp_path: Path) -> None:
    """As with BatchNorm: 38 samples in 32 parts, of which some have a single one; in 16 parts, of 3, too many."""
    said = why(tmp_path / "run", Small(2, least=2, is_full=False), "data.batch_size=38")
    assert said.endswith("train.accumulate = 19, which computes 2 at once and fits (tried on this worker)."), said


class Endless(Small):
    """One that never ends once memory is full."""

    def forward(self, features: torch.Tensor) -> Any:
        scores = super().forward(features)
        while self.is_full:
            scores = scores + 1
        return scores


def test_what_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_LONGEST_S", 0.5)
    said = why(tmp_path / "run", Endless(2, is_full=False))
    named = "train.accumulate = 2, which computes 16 at once"
    assert said.endswith(f"{named} (whether that fits could not be tried: it takes more than 0.5 s)."), said
    for thread in threading.enumerate():
        if thread.name == "disttrain-what-fits":
            thread.join(60)
            assert not thread.is_alive()


class SmallTogether(Small):
    """One that asks the other workers for something."""

    def forward(self, features: torch.Tensor) -> Any:
        scores = super().forward(features)
        dist.all_reduce(torch.zeros(1))
        return scores


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (Small, "4, which computes 4 at once and fits (tried on this worker)."),
        (SmallTogether, "2, which computes 8 at once (whether that fits could not be tried: the model or the task "),
    ],
)
def test_what_one_of_two_workers_tries_is_not_seen_by_the_other(
    tmp_path: Path, network: Callable[[int], nn.Module], found: str
) -> None:
    """Which waits for it in the middle of a step, in gloo, and would take it for its own."""

    def failure() -> tuple[str, bool]:
        model = network(5 if os.environ["RANK"] == "1" else 99)
        with pytest.raises((DisttrainError, RuntimeError)) as caught:
            trained(tmp_path, model, "parallel.shared_memory=false")
        return str(caught.value), is_lost_peer(caught.value)

    (_, is_consequence), (said, is_not) = run_workers(failure, 2, process_group=False, timeout_s=120)
    assert said.startswith("out of memory in step 1, with 16 samples computed at once: "), said
    assert f"; begin a new run with train.accumulate = {found}" in said, said
    assert (is_consequence, is_not) == (True, False)
    assert not (tmp_path / "checkpoints").exists()


def test_the_evaluation_batch_that_is_named_fits(tmp_path: Path) -> None:
    model = Small(5)
    with pytest.raises(DisttrainError) as caught:
        trained(tmp_path, model, "train.accumulate=8", "train.eval_batch_size=11")
    words = "; resume with train.eval_batch_size = 5, which fits (tried on this worker)."
    assert str(caught.value).endswith(words), str(caught.value)
    assert trained(tmp_path, model, "train.accumulate=8", "train.eval_batch_size=5").step == 2


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_is_known_not_to_fit_is_not_named(tmp_path: Path, error: type[BaseException]) -> None:
    """Of 11 samples, 5 do not fit; with 2, the model fails in another way."""
    model = Small(2, least=3, is_full=False, error=error)
    with pytest.raises(DisttrainError) as caught:
        trained(tmp_path, model, "train.accumulate=8", "train.eval_batch_size=11")
    words = f"train.eval_batch_size = 2 (whether that fits could not be tried: {error.__name__}: too few)."
    assert str(caught.value).endswith(words), str(caught.value)


def test_the_first_step_of_a_resume_is_worth_a_retry(tmp_path: Path) -> None:
    """It fitted before; after a crash the memory may still be held by who has not ended yet."""
    one = case("regression")

    def train(first: int, *overrides: str) -> None:
        sets = {"train_set": one.train_set, "test_set": one.test_set}
        words = ["data.batch_size=16", "train.epochs=1", *overrides]
        disttrain.train(QUIET, overrides=words, run_dir=tmp_path, task=Hungry("loss", first), model=one.model, **sets)

    train(99, "train.max_steps=1")
    with pytest.raises(DisttrainError, match=r"^out of memory in step 2, ") as caught:
        train(1)
    assert caught.value.exit_code == 1


def test_a_gpus_own_words_are_read() -> None:
    words = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB"
    assert is_out_of_memory(torch.OutOfMemoryError(words))
    assert _asked(torch.OutOfMemoryError(words)) == "2.50 GiB could not be allocated"
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
