"""Language models trained by any number of workers, killed and resumed: the same bits."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint
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
    kill = faults.kill(1, step=5)
    with suppress(WorkerFailed), workers(2, faults=[kill], process_group=False, check_collectives=False) as group:
        group.run(train, tmp_path, "killed", job)
    assert kill.happened
    run_workers(train, 3, args=(tmp_path, "killed", job), process_group=False)

    alone, *others = (outcome(tmp_path / name) for name in ("1", "2", "3", "killed"))
    assert alone.metrics
    for other in others:
        assert other == alone
    evaluation = json.loads((tmp_path / "1" / "evaluation.json").read_text())
    assert evaluation["metrics"].keys() >= {"loss", "perplexity", "bits_per_byte"}
    checkpoint = read_checkpoint(CheckpointStore(tmp_path / "1" / "checkpoints").paths()[-1])
    assert "head.weight" not in checkpoint.model or job == "padded", "tied weights are saved once"
