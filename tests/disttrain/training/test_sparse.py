"""Sparse gradients, as `nn.Embedding(sparse=True)` has them: trained with where torch can, else refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import disttrain
from disttrain.errors import ConfigurationError
from disttrain.testing import run_workers

SAMPLES = [(torch.arange(place, place + 5) % 40, place % 3) for place in range(60)]


class Table(nn.Module):
    """The mean of the rows of five words, and three scores of it."""

    def __init__(self, sparse: bool | Literal["by hand"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.scores = nn.Embedding(40, 4, sparse=sparse is True), nn.Linear(4, 3)
        self.by_hand = sparse == "by hand"

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(words, self.table.weight, sparse=True) if self.by_hand else self.table(words)
        scores: torch.Tensor = self.scores(rows.mean(1))
        return scores


class Words(disttrain.Task):
    """`still`: no momentum for the table."""

    best = ("loss", "min")

    def __init__(self, *, still: bool = False) -> None:
        self.still = still

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        words, label = batch
        return F.cross_entropy(model(words), label, reduction="sum")

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, Table)
        table: dict[str, Any] = {"params": [model.table.weight], **({"momentum": 0.0} if self.still else {})}
        return [table, {"params": list(model.scores.parameters())}]


def train(run_dir: Path, sparse: bool | Literal["by hand"], *, still: bool = False, **options: Any) -> torch.Tensor:
    recipe: dict[str, Any] = {
        "data": {"batch_size": 12},
        "train": {"threads": 1, "epochs": 2, **options.pop("train", {})},
        "tracking": {"uri": "none", "system_metrics": False},
        **{name: value for name, value in options.items() if name != "optim"},
        "optim": {"lr": 0.5, **options.get("optim", {})},
    }
    model = Table(sparse)
    disttrain.train(
        recipe, run_dir=run_dir, model=model, task=Words(still=still), train_set=SAMPLES[:48], test_set=SAMPLES[48:]
    )
    return torch.cat([one.detach().flatten() for one in model.parameters()])


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"momentum": 0.9}, "SGD with momentum = 0.9 does not"),
        ({"weight_decay": 0.01}, "SGD with weight_decay = 0.01 does not"),
        ({"name": "adamw", "weight_decay": 0.0}, "AdamW does not"),
        ({"name": "adagrad", "weight_decay": 0.1}, "Adagrad with weight_decay = 0.1 does not"),
        ({"name": "muon", "weight_decay": 0.0, "momentum": 0.5}, "Muon with momentum = 0.5 does not"),
    ],
)
def test_an_optimizer_that_does_not_take_them_is_refused_before_training(
    tmp_path: Path, optim: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^optim: {said} take the gradient of 'table.weight'") as caught:
        train(tmp_path / "run", sparse=True, optim=optim)
    assert "make it dense (sparse=False)" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    train(tmp_path / "dense", sparse=False, optim=optim)


@pytest.mark.parametrize("options", [{"optim": {"name": "adagrad"}}, {"still": True, "optim": {"momentum": 0.9}}])
def test_an_optimizer_that_takes_them_comes_to_what_it_does_with_dense_ones(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    sparse, dense = (train(tmp_path / f"{is_sparse}", is_sparse, **options) for is_sparse in (True, False))
    torch.testing.assert_close(sparse, dense)


def test_two_workers_come_to_what_they_do_with_dense_ones_and_resume(tmp_path: Path) -> None:
    """Sums in memory and through gloo, apart, clipped, accumulated, averaged, with steps that are watched."""
    apart = {"accumulate": 2, "clip_norm": 0.3, "non_finite": "skip"}
    every = {**apart, "ema_decay": 0.9}
    cases: list[dict[str, Any]] = [
        {"train": every},
        {"train": every, "parallel": {"shared_memory": False}},
        {"train": apart, "parallel": {"sync_every": 2}},
    ]

    def of_worker(tmp_path: Path) -> None:
        for number, case in enumerate(cases):
            for part in (1, 2):
                settings = {**case, "train": {**case["train"], "epochs": part}}
                parts = train(tmp_path / f"parts-{number}", sparse=True, **settings)
            sparse = train(tmp_path / f"whole-{number}", sparse=True, **case)
            dense = train(tmp_path / f"dense-{number}", sparse=False, **case)
            assert torch.equal(sparse, parts)
            torch.testing.assert_close(sparse, dense)

    run_workers(of_worker, 2, args=(tmp_path,), process_group=False)


@pytest.mark.parametrize(("sparse", "strategy"), [("by hand", "ddp"), (True, "fsdp")])
def test_where_several_workers_cannot_sum_them_the_message_says_so(
    tmp_path: Path, sparse: bool | Literal["by hand"], strategy: str
) -> None:
    def of_worker(run_dir: Path) -> str:
        with pytest.raises(ConfigurationError) as caught:
            train(run_dir, sparse, parallel={"strategy": strategy})
        return str(caught.value)

    for said in run_workers(of_worker, 2, args=(tmp_path / "run",), process_group=False):
        assert "a gradient is sparse, which this way of training cannot sum: make it dense (sparse=False)" in said
        assert "backend" not in said
