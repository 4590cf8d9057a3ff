"""Memory that is not there. The machine's own: no GPU is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import disttrain
from disttrain.errors import DisttrainError, is_out_of_memory
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
            "the evaluation at step 3, with train.eval_batch_size = 64: {} resume with",
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
