"""What is called how: the files of a run, its checkpoints, and the variables between a launcher and its workers.

For all readers and writers, with and without torch; each name is defined here and nowhere else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.files import being_written, parse_json, read_text

# A run directory, and what is behind the URL of a run.
RECIPE = "recipe.toml"
JOURNAL = "journal.jsonl"
EVALUATION = "evaluation.json"
SPIKES = "spikes.json"
DELIVERED = "mlflow.json"
"""What MLflow has of the run."""
CHECKPOINTS = "checkpoints"
LOGS = "logs"
CHARTS = "charts"
EXPORTED = "model"
"""The folder of the model that MLflow serves."""
LOCK = ".lock"
"""Locked by the process that owns the run."""
EPOCH = ".epoch"
"""How many workers have owned a run on several machines, one after the other, see `runs.fence`."""
STOP = "stop"
"""A file that is made there asks the run to save and stop."""
OF_A_KILLED_START = {LOGS, LOCK, EPOCH, STOP, *(being_written(Path(name)).name for name in (RECIPE, EPOCH))}
"""What a first start leaves that was killed or refused before it had a recipe; a stop may have been requested."""

# A checkpoint.
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
EVAL = "eval/"
"""What the names of metrics of evaluations begin with, in journals and checkpoints."""
CONTENTS = (MODEL, OPTIMIZER, STATE)
"""The files of a checkpoint that one worker has written, besides the manifest; see `contents_of` for others."""

# Beside the run directories.
DATABASE = "mlflow.db"
"""MLflow's, unless a run names another or a server."""

# What a launcher passes to its workers, as environment variables.
LAUNCHED_BY = "DISTTRAIN_LAUNCHER"
LAUNCHER_PID = "DISTTRAIN_LAUNCHER_PID"
JOINS = "DISTTRAIN_JOINS"  # set for a worker that joins a run under way
CONSOLE = "DISTTRAIN_CONSOLE"  # the descriptors of the launcher's output and errors, for whoever takes rank 0's place
VERDICTS = "DISTTRAIN_VERDICTS"  # the descriptor of the pipe by which the launcher reports lost workers
LEASE = "DISTTRAIN_LEASE"  # the descriptor of what says until when a worker may run, if another machine leads
NODE_SLOT = "DISTTRAIN_NODE_SLOT"  # "2 8": this machine is the third of at most eight, as long as it takes part
LAUNCHER_OPTIONS = "DISTTRAIN_OPTIONS"
DEVICE = "DISTTRAIN_DEVICE"
"""What `train.device = "auto"` stands for: cuda where GPUs were asked for, so that none trains on a CPU unnoticed."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's name for the file in which a worker says how it ended."""

STEP = "step-"
NEEDS_A_RESTART = "parallel.on_lost_worker: a loss needs a restart (--max-restarts): "
"""How the line begins by which a run says why it does not continue without a lost worker."""
CHECKPOINT_NAME = re.compile(rf"{STEP}(\d{{8,}})")


def checkpoint_name(step: int) -> str:
    """What the checkpoint of a step is called: step-00000500."""
    return f"{STEP}{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints there are in a run's folder of them, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, whole or not."""
    return max(checkpoints_in(run_dir / CHECKPOINTS), key=step_of, default=None)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint's folder, whole or not."""
    return any(os.path.isfile(path / name) for name in (MANIFEST, MODEL))  # False also for impossible names


def shard_names(file: str, num_ranks: int) -> list[str]:
    """What MODEL or OPTIMIZER is called in a checkpoint that each rank wrote its part of, by rank."""
    return [file.replace(".", f".rank-{rank:05d}.") for rank in range(num_ranks)]


def contents_of(manifest: Any) -> tuple[str, ...] | None:
    """The files that a checkpoint's manifest lists, whatever that may hold; None unless they are those of one."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return None
    if manifest.get("format") == 1:
        return CONTENTS if set(files) == set(CONTENTS) else None
    num_ranks = (len(files) - 1) // 2
    names = (*shard_names(MODEL, num_ranks), *shard_names(OPTIMIZER, num_ranks), STATE)
    return names if manifest.get("format") == 2 and num_ranks > 0 and set(files) == set(names) else None


def metrics_of(path: Path) -> dict[str, float]:
    """What was measured at this checkpoint, by name; nothing if nothing was, or if it cannot be read."""
    try:
        return metrics_in(parse_json(read_text(path / STATE)))
    except (OSError, ValueError):
        return {}


def metrics_in(state: Any) -> dict[str, float]:
    """What a checkpoint's state says was measured, whatever may stand in it: "accuracy", not "eval/accuracy"."""
    metrics = state.get("metrics") if isinstance(state, dict) else None
    if not isinstance(metrics, dict):
        return {}
    return {
        name.removeprefix(EVAL): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023
    }


@dataclass(frozen=True)
class Best:
    """The metric by which a checkpoint is better than another, and which end of it is: "min" or "max"."""

    metric: str = "accuracy"
    mode: str = "max"

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """A number that is larger the better the metrics are; None if this one is not there, or not finite."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "max" else -value

    def __str__(self) -> str:
        return f"{self.metric}:{self.mode}"


def best_in(state: Any) -> Best:
    """What decides in the run of this state; in one of before there was a choice, the accuracy."""
    found = state.get("best") if isinstance(state, dict) else None
    if not isinstance(found, dict) or found.keys() != {"metric", "mode"}:
        return Best()
    return Best(str(found["metric"]), str(found["mode"]))


def log_name(rank: int | str) -> str:
    """What a worker's log is called, in the folder LOGS."""
    return f"worker-{rank}.log"


def log_file(run_dir: Path, rank: int) -> Path:
    """Where a worker logs."""
    return run_dir / LOGS / log_name(rank)
