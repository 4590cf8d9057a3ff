"""Names that several programs share stand in `disttrain.layout`, once."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain import layout
from disttrain.runs.summary import newest_step

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in (ROOT / "disttrain", ROOT / "launch")
    for path in folder.rglob("*.py")
    if "testing" not in path.relative_to(ROOT).parts
]


def texts(path: Path) -> Iterator[str]:
    """The strings in a file's code, those within f-strings too, but no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


@functools.cache
def written() -> dict[str, str]:
    """All those strings, by file."""
    return {path.relative_to(ROOT).as_posix(): "\n".join(texts(path)) for path in SOURCES}


def _without(words: str, event: str) -> str:
    return words.replace(event, "")


@pytest.mark.parametrize(
    "name",
    [
        layout.RECIPE, layout.JOURNAL, layout.EVALUATION, layout.SPIKES, layout.DELIVERED, layout.DATABASE,
        layout.MANIFEST, layout.STATE, layout.MODEL, layout.OPTIMIZER, layout.LAUNCHED_BY, layout.LAUNCHER_OPTIONS,
        layout.ERROR_FILE, layout.STEP, "worker-",
    ],
)  # fmt: skip
def test_a_name_is_written_once(name: str) -> None:
    events = ("worker-lost", "worker-joined")  # of the journal
    found = {path for path, words in written().items() if name in functools.reduce(_without, events, words)}
    found.discard("launch/disttrain_launch/kubernetes/spec.py")  # PyTorchJobs call pods worker-N
    assert found == {"disttrain/layout.py"}


def test_the_newest_step_is_that_of_the_checkpoints_or_of_the_last_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert newest_step(run) is None
    (run / layout.CHECKPOINTS).mkdir(parents=True)
    assert newest_step(run) == 0
    for name in (layout.checkpoint_name(7), "step-00000009.damaged", layout.checkpoint_name(100_000_000)):
        (run / layout.CHECKPOINTS / name).mkdir()
    assert layout.newest_checkpoint(run) == run / "checkpoints" / "step-100000000"
    (run / layout.CHECKPOINTS / "step-100000000").rmdir()
    assert newest_step(run) == 7
    metrics = '{{"kind": "metrics", "step": {}, "metrics": {{"train/loss": 1}}}}\n'
    (run / layout.JOURNAL).write_text(metrics.format(999) + metrics.format(12) + metrics.format(13).rstrip())
    assert newest_step(run) == 12, "neither the highest, nor one that is being written"
