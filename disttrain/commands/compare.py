"""Two runs side by side: whether they have the same bits, and where they diverge. Used by `disttrain prove`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from disttrain.layout import STATE
from disttrain.worker import leave, worker

if TYPE_CHECKING:
    import torch

_BITS = ("train/loss", "train/grad_norm", "eval/")


@click.command(name="python -m disttrain.commands.compare")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
def command(reference: Path, run: Path) -> None:
    """Compare the newest checkpoints, the checkpoints at the same steps and the journals of REFERENCE and RUN.

    Prints one JSON object: `same`, `step`, `weights_sha256`, `optimizer_sha256` (of RUN), `first_metric` (the first
    metric that differs: name and step) and `first_tensor` (the first tensor that differs: name, step, and the last step
    whose checkpoints are the same), each null if there is none.
    """
    from disttrain.checkpoint import CheckpointStore, check_complete, read_checkpoint, weights_sha256
    from disttrain.errors import ConfigurationError
    from disttrain.layout import CHECKPOINTS

    paths = [CheckpointStore(folder / CHECKPOINTS).paths() for folder in (reference, run)]
    for folder, found in zip((reference, run), paths, strict=True):
        if not found:
            raise ConfigurationError(f"{folder} has no checkpoint to compare.")
    theirs, ours = (read_checkpoint(found[-1]) for found in paths)
    for one in (theirs, ours):
        check_complete(one.state, f"{one.path}/{STATE}")
    hashes = [(weights_sha256(one.model), weights_sha256(one.optimizer)) for one in (theirs, ours)]
    alike = all(theirs.state[key] == ours.state[key] for key in ("step", "metrics", "optimizer", "scaler"))
    first_metric, first_tensor = _first_metric(reference, run), _first_tensor(*paths)
    report = {
        "same": alike and hashes[0] == hashes[1] and first_metric is None and first_tensor is None,
        "step": ours.state["step"],
        "weights_sha256": hashes[1][0],
        "optimizer_sha256": hashes[1][1],
        "first_metric": first_metric,
        "first_tensor": first_tensor,
    }
    print(json.dumps(report))


def _first_metric(reference: Path, run: Path) -> dict[str, Any] | None:
    rows = [_metrics(folder) for folder in (reference, run)]
    for step, name in sorted(rows[0].keys() | rows[1].keys()):
        if rows[0].get((step, name)) != rows[1].get((step, name)):
            return {"name": name, "step": step}
    return None


def _metrics(run: Path) -> dict[tuple[int, str], str]:
    from disttrain.layout import JOURNAL
    from disttrain.runs.journal import read_journal

    if not (run / JOURNAL).is_file():
        return {}
    found: dict[tuple[int, str], str] = {}
    for record in read_journal(run / JOURNAL):
        for name, value in record["metrics"].items() if record["kind"] == "metrics" else ():
            if name.startswith(_BITS):
                key = record["step"], name
                found[key] = "journalled twice" if key in found else repr(value)  # so that NaN equals itself
    return found


def _first_tensor(reference: list[Path], run: list[Path]) -> dict[str, Any] | None:
    from disttrain.checkpoint import read_checkpoint

    ours = {path.name: path for path in run}
    same_until = 0
    for path in reference:
        if path.name not in ours:
            continue
        one, other = read_checkpoint(path), read_checkpoint(ours[path.name])
        name = _first_difference(one.model, other.model)
        if name is None and (index := _first_difference(one.optimizer, other.optimizer)) is not None:
            name = f"the optimizer's {index}"
        if name is not None:
            return {"name": name, "step": one.state["step"], "same_until": same_until}
        same_until = one.state["step"]
    return None


def _first_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str | None:
    from disttrain.checkpoint import weights_sha256

    names = [*one, *(name for name in other if name not in one)]
    for name in names:
        if name not in one or name not in other:
            return name
        if weights_sha256({"": one[name]}) != weights_sha256({"": other[name]}):
            return name
    return None


if __name__ == "__main__":
    leave(worker(command))
