"""What the tests of exact mode share: a small job, and everything about a run that must be the same to the last bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.training.result import Result

# 70 samples in batches of 16: the last one has 6, so that slices and their parts come in several sizes, and some empty.
SMALL = (
    "data.dataset=synthetic",
    "data.options={num_train=70, num_test=31, num_classes=3}",
    "data.batch_size=16",
    "data.crop_padding=0",
    "train.epochs=2",
    "train.log_every_steps=1",
    "train.eval_batch_size=8",
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "parallel.exact=true",
)


def build(num_classes: int, sample_shape: tuple[int, int, int]) -> nn.Module:
    """A network with BatchNorm and dropout: state in buffers, and numbers drawn in every step."""
    return nn.Sequential(
        nn.Conv2d(sample_shape[0], 6, 5, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(6 * 7 * 7, num_classes),
    )


def train(run_dir: Path, *overrides: str, model: nn.Module | None = None) -> Result:
    """Train the small job, in whatever world this process is."""
    recipe = load_recipe("digits", [*SMALL, *overrides])
    return disttrain.train(recipe, run_dir=run_dir, model=model)


@dataclass(frozen=True)
class Outcome:
    """A finished run, without anything that may differ from start to start."""

    weights: str
    optimizer: str
    state: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: dict[tuple[int, str], float]


def outcome(run_dir: Path) -> Outcome:
    """What became of the run. Fails if a metric was journalled twice."""
    checkpoint = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])
    metrics: dict[tuple[int, str], float] = {}
    for record in read_journal(run_dir / "journal.jsonl"):
        for name, value in record["metrics"].items() if record["kind"] == "metrics" else ():
            if name.startswith(("train/loss", "train/grad_norm", "train/learning_rate", "eval/")):
                assert (record["step"], name) not in metrics, f"{name} of step {record['step']} is journalled twice"
                metrics[record["step"], name] = value
    assert sum(name == "train/loss" for _, name in metrics) == checkpoint.state["step"]
    return Outcome(
        weights=weights_sha256(checkpoint.model),
        optimizer=weights_sha256(checkpoint.optimizer),
        state={key: checkpoint.state[key] for key in ("step", "finished", "metrics", "optimizer", "scaler")},
        evaluation=json.loads((run_dir / "evaluation.json").read_text()),
        metrics=metrics,
    )
