"""Weights for other programs: one file, or the layout of Hugging Face with its index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from disttrain.checkpoint import write_checkpoint
from disttrain.checkpoint.weights import read_weights
from disttrain.commands import runs
from disttrain.errors import ConfigurationError, UsageError
from tests.disttrain.checkpoint.test_checkpoint import state

WEIGHTS = {"a": torch.arange(50.0).view(5, 10), "b": torch.ones(30), "c": torch.ones(30, dtype=torch.bfloat16)}
AVERAGES = {"ema.a": torch.zeros(5, 10), "ema.b": torch.full((30,), 2.0)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000003"
    write_checkpoint(path, WEIGHTS, AVERAGES, {**state(3), "shared": {"tied": "a"}})
    return path


def export(*arguments: object) -> Any:
    done = CliRunner().invoke(runs.command, ["export", *map(str, arguments), "--json"])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def test_one_file_has_the_averages_or_the_raw_weights_and_says_what_it_is(tmp_path: Path, checkpoint: Path) -> None:
    assert export(checkpoint, tmp_path / "new" / "one")["files"] == ["model.safetensors"]
    file = tmp_path / "new" / "one" / "model.safetensors"
    found = load_file(file)
    assert found.keys() == WEIGHTS.keys(), "what is tied is there once"
    assert torch.equal(found["a"], AVERAGES["ema.a"])
    assert torch.equal(found["b"], AVERAGES["ema.b"])
    assert torch.equal(found["c"], WEIGHTS["c"])
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    (tmp_path / "link").symlink_to(tmp_path)
    export(checkpoint, tmp_path / "link" / "raw", "--raw")
    assert all(
        torch.equal(one, WEIGHTS[name]) for name, one in load_file(tmp_path / "raw" / "model.safetensors").items()
    )
    with pytest.raises(UsageError, match="is not an empty folder"):
        export(checkpoint, tmp_path / "raw")


def test_files_of_at_most_a_size_have_an_index_that_is_read(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "parts")
    files = export(checkpoint, ".", "--raw", "--max-size", "190B")["files"]
    first, second, index = files
    assert (first, second) == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    content = json.loads((tmp_path / "parts" / index).read_text())
    assert index == "model.safetensors.index.json"
    assert content["metadata"] == {"total_size": 200 + 120 + 60}
    assert content["weight_map"] == {"a": first, "b": second, "c": second}, "only one that is larger is alone"
    found = read_weights(tmp_path / "parts")  # as model.init reads it
    assert all(torch.equal(found[name], one) for name, one in WEIGHTS.items())
    with pytest.raises(ConfigurationError, match="that home folder is unknown"):
        export(checkpoint, "~no-such-user/weights")
    with pytest.raises(SystemExit):
        export(checkpoint, tmp_path / "other", "--max-size", "5 bananas")
    assert not (tmp_path / "other").exists()
