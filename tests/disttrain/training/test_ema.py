"""The average of the weights: what it is, that it is evaluated and saved, and that it has the same bits anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.commands import evaluate
from disttrain.errors import ConfigurationError
from disttrain.testing import run_workers
from disttrain.training.ema import WeightAverage
from tests.disttrain.parallel.exact_runs import build, outcome, train

AVERAGED = ("train.ema_decay=0.9", "model.name=tests.disttrain.parallel.exact_runs:build", "optim.lr=0.3")


def newest(run_dir: Path) -> Any:
    return read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])


def test_an_average_follows_the_weights_and_takes_their_place_for_a_while() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average = WeightAverage(model, 0.5)
        expected = 0.0
        for step, weight in enumerate((1.0, 2.0, 4.0)):
            model.weight.fill_(weight)
            average.update(step)
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weight
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0
    with pytest.raises(ConfigurationError, match=r"average of 'weight' is not there, .* \(train\.ema_decay\)"):
        average.load({})


def test_an_average_of_half_precision_weights_has_room_for_small_differences() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = WeightAverage(model, 0.999)
        model.weight.fill_(2.0)
        for _ in range(10):
            average.update(10**6)
    assert average.tensors()["ema.weight"].item() == pytest.approx(1.00996, abs=1e-4)


def test_averages_have_the_same_bits_at_every_number_of_workers_and_after_a_stop(tmp_path: Path) -> None:
    train(tmp_path / "1", *AVERAGED)
    run_workers(train, 2, args=(tmp_path / "2", *AVERAGED), process_group=False)
    train(tmp_path / "parts", *AVERAGED, "train.max_steps=4")
    run_workers(train, 3, args=(tmp_path / "parts", *AVERAGED), process_group=False)
    reference = outcome(tmp_path / "1")
    for name in ("2", "parts"):
        found = outcome(tmp_path / name)
        assert (found.weights, found.optimizer) == (reference.weights, reference.optimizer)
        assert found.state["metrics"] == reference.state["metrics"]

    plain = tmp_path / "plain"
    train(plain, *AVERAGED[1:])
    assert not newest(plain).averages
    assert outcome(plain).weights == reference.weights, "it watches the training and changes nothing in it"
    checkpoint = newest(tmp_path / "1")
    assert set(checkpoint.averages) == {name for name, _ in build(3, (3, 32, 32)).named_parameters()}

    def measured(*options: str) -> float:
        done = CliRunner().invoke(evaluate.command, [str(tmp_path / "1"), "--json", "--trust", *options])
        assert done.exit_code == 0, done.output
        loss: float = json.loads(done.stdout)["loss"]
        return loss

    assert measured() == reference.state["metrics"]["eval/loss"]
    assert measured("--raw") == outcome(plain).state["metrics"]["eval/loss"] != measured()


class Tied(nn.Module):
    """Its last layer has the weights of the one before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.second(self.first(images.flatten(1)[:, :64]).tanh()).tanh())
        return scores


def test_tied_weights_are_saved_once_and_resumed_as_tied(tmp_path: Path) -> None:
    options = ("train.ema_decay=0.9", "optim.momentum=0.9")
    whole, parts = Tied(), Tied()
    train(tmp_path / "whole", *options, model=whole)
    run_workers(lambda: train(tmp_path / "parts", *options, "train.max_steps=4", model=Tied()), 2, process_group=False)
    train(tmp_path / "parts", *options, model=parts)
    assert parts.second.weight is parts.first.weight
    assert outcome(tmp_path / "parts").weights == outcome(tmp_path / "whole").weights
    checkpoint = newest(tmp_path / "parts")
    assert checkpoint.state["shared"] == {"second.weight": "first.weight"}
    averaged = checkpoint.averaged().model
    assert averaged["second.weight"] is averaged["first.weight"]
    assert not torch.equal(averaged["first.weight"], checkpoint.model["first.weight"])
    from safetensors.torch import load_file

    assert "second.weight" not in load_file(checkpoint.path / "model.safetensors")
