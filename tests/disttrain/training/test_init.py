"""Starting from weights, and freezing what is not to be trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.checkpoint.weights import read_weights
from disttrain.errors import ConfigurationError
from disttrain.models.freeze import freeze, hold_statistics
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.testing import run_workers

QUIET = (
    "tracking.uri=none", "tracking.system_metrics=false", "train.threads=1", "data.batch_size=12", "train.epochs=2",
    "data.crop_padding=0", "schedule.name=constant", "schedule.warmup_steps=0", "train.eval_batch_size=3",
)  # fmt: skip
LABELS = torch.arange(24) % 3
IMAGES = torch.arange(24 * 16).view(24, 1, 4, 4).to(torch.uint8)


class Net(nn.Module):
    """A body with BatchNorm, and a head."""

    def __init__(self, num_classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.body(images))
        return scores


def train(run_dir: Path, model: nn.Module, *overrides: str) -> None:
    objects = {"train_set": (IMAGES, LABELS), "test_set": (IMAGES[:6], LABELS[:6])}
    disttrain.train(load_recipe("digits", [*QUIET, *overrides]), run_dir=run_dir, model=model, **objects)


def newest(run_dir: Path) -> Any:
    return read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])


def test_a_run_starts_from_another_ones_weights_and_reads_them_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "first", Net())
    weights = newest(tmp_path / "first").model
    capsys.readouterr()
    init = (f"model.init={tmp_path / 'first'}", "model.init_skip=head.*", "optim.lr=0.0")

    def start(steps: int) -> dict[str, torch.Tensor]:
        model = Net(3, seed=1)
        train(tmp_path / "second", model, *init, f"train.max_steps={steps}", "model.freeze=body.2.*")
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    by_rank = run_workers(start, 2, args=(1,), process_group=False)
    for state in by_rank:
        for name, tensor in state.items():
            assert torch.equal(tensor, weights[name]) is not name.startswith("head"), name
    journal = list(read_journal(tmp_path / "second" / "journal.jsonl"))
    (event,) = [record for record in journal if record.get("name") == "init"]
    assert event["source"].endswith("first/checkpoints/step-00000004")
    assert newest(tmp_path / "second").state["init"] == {"source": event["source"], "sha256": event["sha256"]}
    log = (tmp_path / "second" / "logs" / "worker-0.log").read_text()
    assert "starting from" in log
    assert "7 of 9 tensors" in log
    assert "left as they were (model.init_skip): head.bias, head.weight" in log

    (tmp_path / "first").rename(tmp_path / "gone")
    assert (tmp_path / "second" / "checkpoints" / "step-00000001").is_dir()
    start(2)  # resumes: what it started from is in its own checkpoints
    assert newest(tmp_path / "second").state["init"]["source"] == event["source"]


def files(folder: Path) -> Path:
    """Weights as other programs leave them."""
    state = Net(seed=7).state_dict()
    folder.mkdir()
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, folder / "wrapped.safetensors")
    save_file({**state, "extra": torch.zeros(1)}, folder / "extra.safetensors")
    save_file({"other": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "old.pt").write_bytes(b"\x80\x02.")
    split = folder / "split"
    split.mkdir()
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(state.items()):
        parts[f"{'ab'[number % 2]}.safetensors"][name] = tensor
    for name, part in parts.items():
        save_file(part, split / name)
    names = ", ".join(f'"{key}": "{name}"' for name, part in parts.items() for key in part)
    (split / "model.safetensors.index.json").write_text('{"weight_map": {' + names + "}}")
    return folder


def test_files_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files(tmp_path / "files")
    reports = {
        "wrapped.safetensors": "9 of 9 tensors",
        "extra.safetensors": "not used: extra",
        "split": "9 of 9 tensors",
    }
    for number, (source, report) in enumerate(reports.items()):
        model = Net(seed=1)
        train(tmp_path / f"run-{number}", model, f"model.init={folder / source}", "optim.lr=0.0", "train.max_steps=1")
        assert torch.equal(model.head.weight, Net(seed=7).head.weight), source
        assert report in capsys.readouterr().out
    assert read_weights(folder / "split" / "model.safetensors.index.json").keys() == Net(seed=7).state_dict().keys()


@pytest.mark.parametrize(
    ("source", "classes", "message"),
    [
        ("old.pt", 3, "model.init: .*old.pt is a pickle, and loading one can run arbitrary code: save the weights"),
        ("pipe.safetensors", 3, "pipe.safetensors cannot be read as safetensors: .*it is a named pipe, not a file"),
        ("nothing", 3, "model.init: .*nothing does not exist; give a run, a checkpoint, or a safetensors file"),
        (".", 3, "of safetensors files it has several: extra.safetensors, other.safetensors, "),
        ("other.safetensors", 3, "none of the names in .* is one of the model's: it has other; the model has body"),
        (
            "extra.safetensors",
            5,
            r"'head\.weight' is \(3, 8\) in .* and the model has \(5, 8\) \(1 more differ\); "
            r'model\.init_skip = \["head\.\*"\] leaves it',
        ),
    ],
)
def test_what_cannot_be_started_from_is_one_line(tmp_path: Path, source: str, classes: int, message: str) -> None:
    folder = files(tmp_path / "files")
    if source.startswith("pipe"):
        os.mkfifo(folder / source)
    with pytest.raises(ConfigurationError, match=message) as caught:
        train(tmp_path / "run", Net(classes), f"model.init={folder / source}")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_tied_weights_are_not_missing_if_one_name_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Tied(Net):
        def __init__(self, seed: int) -> None:
            super().__init__(seed=seed)
            self.again = self.head

    save_file(Net(seed=7).state_dict(), tmp_path / "one.safetensors")
    train(tmp_path / "run", Tied(1), f"model.init={tmp_path / 'one.safetensors'}", "train.max_steps=1")
    assert "missing" not in capsys.readouterr().out

    two = {**Tied(7).state_dict(), "again.weight": torch.zeros(3, 8)}
    save_file({name: tensor.clone() for name, tensor in two.items()}, tmp_path / "two.safetensors")
    init = f"model.init={tmp_path / 'two.safetensors'}"
    with pytest.raises(
        ConfigurationError, match=r"'head\.weight' and 'again\.weight' are one tensor in the model, and"
    ):
        train(tmp_path / "refused", Tied(1), init, "train.max_steps=1")
    model = Tied(1)
    train(tmp_path / "chosen", model, init, "model.init_skip=again.weight", "optim.lr=0.0", "train.max_steps=1")
    assert torch.equal(model.head.weight, Net(seed=7).head.weight)


def test_what_is_frozen_stays_and_so_do_its_statistics(tmp_path: Path) -> None:
    def frozen(run_dir: Path, exact: str) -> dict[str, torch.Tensor]:
        model = Net()
        train(run_dir, model, "model.freeze=body.*", f"parallel.exact={exact}", "optim.lr=0.5")
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    before = Net().state_dict()
    by_rank = run_workers(frozen, 2, args=(tmp_path / "two", "true"), process_group=False)
    for state in (frozen(tmp_path / "alone", "false"), *by_rank):
        for name, tensor in state.items():
            assert torch.equal(tensor, before[name]) is name.startswith("body"), name


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["tail.*"], r"model\.freeze: no parameter matches 'tail\.\*'"),
        (["*"], "model.freeze: the patterns match every parameter, so nothing is left to train"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        freeze(Net(), patterns)


def test_only_a_batchnorm_that_is_frozen_as_a_whole_keeps_its_statistics() -> None:
    for patterns, stays in ((["body.2.*"], True), (["body.2.weight"], False), (["head.*"], False)):
        model = Net()
        hold_statistics(model, patterns)
        model.train()
        assert model.body[2].training is not stays
        model.eval()
        assert not model.body[2].training
