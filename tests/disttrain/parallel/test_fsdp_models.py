"""Models and tasks of a user's own in shards: what is tied, unused, frozen, skipped or killed; what cannot be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import disttrain
from disttrain.checkpoint import Checkpoint, CheckpointStore, read_checkpoint, weights_sha256
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.testing import WorkerFailed, faults, run_workers, workers

FSDP = "parallel.strategy=fsdp"
SMALL = (
    "data.batch_size=7",
    "optim.name=sgd",
    "optim.lr=0.1",
    "optim.momentum=0.9",
    "train.epochs=2",
    "train.eval_batch_size=3",
    "checkpoint.every_steps=1",
    "tracking.uri=none",
    "tracking.system_metrics=false",
)


class Signs(disttrain.Task):
    """Whether the sum of an input is positive. One input of the training set gives a loss that is NaN."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        loss = functional.cross_entropy(model.scores(inputs), labels, reduction="sum")
        loss = loss + functional.cross_entropy(model.scores(inputs / 2), labels, reduction="sum")
        return loss * float("nan") if model.training and (inputs > 2.4).any() else loss


def samples(num: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    inputs = torch.randn(num, 6, generator=torch.Generator().manual_seed(seed))
    return [(one, int(one.sum() > 0)) for one in inputs]


class Odd(nn.Module):
    """Two rows for three workers, in a weight that has two names; BatchNorm; parameters that no loss depends on.

    One input of the training set gives a gradient of which a single number is not finite, and with it only the rows
    of one worker, while its loss is finite on all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(2))
        self.last, self.same = nn.Linear(5, 2), nn.Linear(5, 2)
        self.same.weight = self.last.weight
        self.idle = nn.Linear(3, 3)
        self.corner = nn.Parameter(torch.ones(3))

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.first(inputs)
        for block in self.blocks:
            x = block(x)
        corner = self.corner * 0.0
        if self.training and (inputs < -3.0).any():
            corner = torch.cat([corner[:1].sqrt(), corner[1:]])
        return self.last(x) + self.same(x) + corner.sum()  # type: ignore[no-any-return]


class BySample(Odd):
    """Each worker's samples choose which of two layers of one size it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 5), nn.Linear(5, 5)

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        layer = self.one if inputs.sum() > 0 else self.other
        return self.last(layer(self.first(inputs)))  # type: ignore[no-any-return]


class Turned(Odd):
    """A weight that lies in memory column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight = nn.Parameter(torch.ones(6, 5).t())


def train(run_dir: Path, model: Any, *overrides: str) -> dict[str, float]:
    recipe = load_recipe("digits", [*SMALL, *overrides])
    sets = {"train_set": samples(20, 1), "test_set": samples(10, 2)}  # 4 batches of 3 for three workers to evaluate
    return disttrain.train(recipe, run_dir=run_dir, model=model, task=Signs, **sets).metrics


def newest(run_dir: Path) -> Checkpoint:
    return read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])


def kinds_of_incidents(run_dir: Path) -> set[str]:
    """What was not finite."""
    events = [one for one in read_journal(run_dir / "journal.jsonl") if one.get("name") == "non-finite"]
    return {"loss" if one["samples"] else "gradient" for one in events}


def test_an_odd_model_has_the_numbers_of_one_worker_with_a_step_skipped_and_layers_frozen(tmp_path: Path) -> None:
    overrides = ("model.sync_batchnorm=true", "train.non_finite=skip", "model.freeze=blocks.0.0.*")
    alone = train(tmp_path / "alone", Odd, *overrides)
    by_rank = run_workers(train, 3, args=(tmp_path / "three", Odd, *overrides, FSDP), process_group=False)
    assert by_rank == [pytest.approx(alone, rel=1e-4)] * 3
    one, three = newest(tmp_path / "alone"), newest(tmp_path / "three")
    assert one.state["non_finite"]["total"] == three.state["non_finite"]["total"] > 0
    assert kinds_of_incidents(tmp_path / "three") == kinds_of_incidents(tmp_path / "alone") == {"loss", "gradient"}
    assert one.state["shared"] == three.state["shared"] == {"same.weight": "last.weight"}
    for mine, theirs in ((one.model, three.model), (one.optimizer, three.optimizer)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.long
def test_a_worker_that_is_killed_leaves_no_trace_at_one_number_of_workers(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    overrides = ("train.non_finite=skip", "train.ema_decay=0.9", FSDP)
    run_workers(train, 2, args=(undisturbed, Odd, *overrides), process_group=False)
    with workers(2, faults=[faults.kill(1, step=4)], process_group=False) as group, pytest.raises(WorkerFailed):
        group.run(train, killed, Odd, *overrides)
    assert 0 < newest(killed).state["step"] < newest(undisturbed).state["step"]
    run_workers(train, 2, args=(killed, Odd, *overrides), process_group=False)
    assert weights_sha256(newest(killed).model) == weights_sha256(newest(undisturbed).model)
    assert weights_sha256(newest(killed).optimizer) == weights_sha256(newest(undisturbed).optimizer)


def test_what_would_mix_up_weights_or_cannot_begin_anew_is_refused(tmp_path: Path) -> None:
    def refused() -> list[str]:
        given, said = Odd(), []
        train(tmp_path / "given", given, FSDP, "train.non_finite=zero", "train.max_steps=1")
        for model, *overrides in ((BySample,), (given,), (Odd(), "train.spike_factor=3"), (Turned,)):
            with pytest.raises(ConfigurationError) as caught:
                train(tmp_path / str(len(said)), model, FSDP, *overrides)
            said.append(str(caught.value))
        return said

    for by_sample, again, spikes, turned in run_workers(refused, 2, process_group=False):
        assert "not all workers called the same blocks and gave gradients to the same parameters" in by_sample
        assert "the model given is sharded already" in again
        assert "cannot be combined with train.spike_factor and a model given as an object" in spikes
        assert "the parameter 'first.weight' is not contiguous in memory" in turned
