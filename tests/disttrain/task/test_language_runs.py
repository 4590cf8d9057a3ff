"""Language models trained by any number of workers, killed and resumed: the same bits."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.commands.predict import command as predict
from disttrain.data.dataset import SampleSet
from disttrain.data.sources.text import load_text
from disttrain.errors import printable
from disttrain.recipe import load_recipe
from disttrain.testing import WorkerFailed, faults, run_workers, workers
from tests.disttrain.parallel.exact_runs import outcome

# Documents of 1 to 60 characters, so that tokens are shared out unevenly; with blocks of 8 several are in one, and the
# last batch has a block of its own.
TEXTS = {
    f"{number:02}.txt": "The cat sat on the mat. It was a small, black cat, and an old mat."[: number * 3]
    for number in range(1, 21)
}
SMALL = (
    "data.batch_size=7",
    "model.options={num_layers=1, num_heads=2, dim=8, dropout=0.1}",
    "train.epochs=3",
    "train.log_every_steps=1",
    "train.eval_batch_size=3",
    "checkpoint.every_steps=2",
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "parallel.exact=true",
)
JOBS = {
    "packed": ("data.options={context_length=8}", "train.accumulate=2"),
    "padded": (
        "data.options={context_length=16, layout='padded', tokens='bytes'}",
        "model.options={num_layers=1, num_heads=2, dim=8, positions='learned', tie_weights=false}",
        "train.precision=bf16",
        "optim.decay_biases_and_norms=false",
    ),
}


def train(folder: Path, name: str, job: str) -> None:
    overrides = [*SMALL, *JOBS[job], f"data.root={folder / 'texts'}"]
    disttrain.train(load_recipe("text-gpt", overrides), run_dir=folder / name)


@pytest.mark.parametrize("job", JOBS)
def test_any_number_of_workers_and_a_kill_give_the_same_bits(tmp_path: Path, job: str) -> None:
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).write_text(text)
    for size in (1, 2, 3):
        run_workers(train, size, args=(tmp_path, str(size), job), process_group=False)
    resumed = []
    if job == "packed":
        kill = faults.kill(1, step=5)
        with suppress(WorkerFailed), workers(2, faults=[kill], process_group=False, check_collectives=False) as group:
            group.run(train, tmp_path, "killed", job)
        assert kill.happened
        run_workers(train, 3, args=(tmp_path, "killed", job), process_group=False)
        resumed = ["killed"]

    alone, *others = (outcome(tmp_path / name) for name in ("1", "2", "3", *resumed))
    assert alone.metrics
    for other in others:
        assert other == alone
    evaluation = json.loads((tmp_path / "1" / "evaluation.json").read_text())
    assert evaluation["metrics"].keys() >= {"loss", "perplexity", "bits_per_byte"}
    checkpoint = read_checkpoint(CheckpointStore(tmp_path / "1" / "checkpoints").paths()[-1])
    assert "head.weight" not in checkpoint.model or job == "padded", "tied weights are saved once"

    shutil.rmtree(tmp_path / "texts")  # what a checkpoint holds is enough to continue a text
    words = ["The c", "-o", "length=9", "-o", "seed=3", "--json"]
    answers = [CliRunner().invoke(predict, [str(tmp_path / name), *words]).stdout for name in ("1", "3", "1")]
    texts = [json.loads(answer)["predictions"][0]["prediction"] for answer in answers]
    assert texts[0] == texts[1] == texts[2]
    assert 0 < len(texts[0]) <= 9
    shown = CliRunner().invoke(predict, [str(tmp_path / "1"), *words[:-1]]).stdout
    assert shown == f"'The c': continued as\n{printable(texts[0])}\n"


def disttrain_command(cwd: Path, *words: str) -> Any:
    """What a command prints with --json, run as users do."""
    done = subprocess.run(
        [sys.executable, "-m", "disttrain_launch", *words, "-o", "tracking.uri=none", "--json"],
        cwd=cwd,
        env=os.environ | {"TMPDIR": str(cwd)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_text_gpt_is_proven_exact(tmp_path: Path) -> None:
    answer = disttrain_command(tmp_path, "prove", "text-gpt", "--workers", "1,2,3", "--kills", "5")
    assert answer["same"] is True
    assert [run["kills"] for run in answer["runs"]] == [5, 5, 5]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_text_gpt_learns_far_more_than_which_character_follows_which(tmp_path: Path) -> None:
    recipe = load_recipe("text-gpt", ["tracking.uri=none"])
    metrics = disttrain.train(recipe, run_dir=tmp_path / "run").metrics
    sets = load_text(recipe.data)
    train, test = (_stream(split) for split in (sets.train, sets.test))
    size = sets.train.facts["vocab_size"]
    counts = torch.zeros(size, size, dtype=torch.float64)
    counts.index_put_((train[:-1], train[1:]), torch.ones((), dtype=torch.float64), accumulate=True)
    bigram = (counts + 0.1) / (counts + 0.1).sum(1, keepdim=True)
    perplexity = math.exp(-bigram[test[:-1], test[1:]].log().mean())
    assert 12 < perplexity < 13.5
    assert metrics["perplexity"] < perplexity / 2


def _stream(split: SampleSet) -> torch.Tensor:
    return torch.cat([split.dataset[index]["tokens"][1:] for index in range(len(split))])
