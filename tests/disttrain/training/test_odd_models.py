"""Models that share weights, leave parameters without a gradient, and return dicts, with metrics of a task's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.runs.summary import summarise
from disttrain.testing import run_workers
from tests.disttrain.training.test_init import QUIET


class NextLetter(disttrain.Task):
    """Samples: letters; the model sees all but the last."""

    best = ("perplexity", "min")

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(**batch)["scores"], batch["after"], reduction="sum")

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"perplexity": (sums["loss"] / weight).exp().item(), "nothing": float("nan")}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        letters = model.get_submodule("letters")
        others = [one for name, one in model.named_parameters() if not name.startswith("letters")]
        return [{"params": letters.parameters(), "lr_scale": 2.0, "weight_decay": 0.0}, {"params": others}]


class Letters(nn.Module):
    """Its output has the weights of its input; the values are for another task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.letters, self.body = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.values, self.output = nn.Linear(8, 1), nn.Linear(8, 6, bias=False)
        self.output.weight = self.letters.weight

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.body(self.letters(before)).tanh()
        return {"scores": self.output(state), "values": self.values(state.detach())}


class Meeting(Letters):
    """Its workers exchange something in each forward pass of an evaluation, as sharded models do."""

    passes = 0

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training:
            self.passes += 1
            dist.all_reduce(torch.ones(1))
        return super().forward(before, after)


SAMPLES = [{"before": torch.tensor(number % 6), "after": torch.tensor((number * 5 + 1) % 6)} for number in range(40)]


def train(run_dir: Path, *overrides: str, model: nn.Module | None = None) -> None:
    options = [*QUIET, "optim.lr=0.3", "optim.momentum=0.9", "train.max_steps=8", *overrides]
    recipe = load_recipe("digits", options)
    sets = {"train_set": SAMPLES[:29], "test_set": SAMPLES[29:]}
    disttrain.train(recipe, run_dir=run_dir, model=model or Letters(), task=NextLetter(), **sets)


def weights(run_dir: Path) -> str:
    return weights_sha256(read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1]).model)


def test_tied_unused_and_in_a_dict_they_train_alike_at_every_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = ("train.epochs=3", "parallel.exact=true", "train.ema_decay=0.9", "train.log_every_steps=1")
    train(tmp_path / "alone", *exact)
    said = capsys.readouterr().out
    run_workers(train, 2, args=(tmp_path / "parts", *exact, "train.max_steps=5"), process_group=False)
    train(tmp_path / "parts", *exact)
    assert weights(tmp_path / "parts") == weights(tmp_path / "alone")

    metrics: dict[str, float] = {}
    for record in read_journal(tmp_path / "alone" / "journal.jsonl"):
        metrics |= record["metrics"] if record["kind"] == "metrics" else {}
    assert metrics["train/learning_rate_group_0"] == 2 * metrics["train/learning_rate"] == 0.6
    assert metrics["train/grad_norm"] > 0
    assert f"perplexity {metrics['eval/perplexity']:.4g}" in said
    summary = summarise(tmp_path / "alone")
    assert summary["metrics"] == {"perplexity": metrics["eval/perplexity"]}
    assert (summary["best"]["metric"], summary["accuracy"]) == ("perplexity", None)

    def refusal() -> str:
        with pytest.raises(ConfigurationError) as caught:
            train(tmp_path / "fast")
        return str(caught.value)

    assert all("'values.weight'" in message for message in run_workers(refusal, 2, process_group=False))
    run_workers(train, 2, args=(tmp_path / "fast", "parallel.find_unused_parameters=true"), process_group=False)
    train(tmp_path / "frozen", "model.freeze=values.*")


def test_a_model_with_collectives_of_its_own_is_evaluated_where_batches_do_not_divide_by_workers(
    tmp_path: Path,
) -> None:
    """Three batches for two workers, of which each makes two passes; nothing is counted twice."""

    def evaluated() -> tuple[int, float]:
        model = Meeting()
        overrides = ("train.epochs=1", "train.eval_batch_size=5", "parallel.find_unused_parameters=true")
        train(tmp_path / "run", *overrides, model=model)
        return model.passes, summarise(tmp_path / "run")["metrics"]["perplexity"]

    (passes, together), (others, _) = run_workers(evaluated, 2, process_group=False)
    assert passes == others >= 2
    train(tmp_path / "alone", "train.epochs=1", "train.eval_batch_size=5")
    assert together == pytest.approx(summarise(tmp_path / "alone")["metrics"]["perplexity"], rel=1e-5)
