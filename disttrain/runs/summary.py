"""How a run stands, from its files alone, and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from disttrain.files import parse_json, read_text
from disttrain.layout import (
    CHECKPOINTS,
    DELIVERED,
    JOURNAL,
    STATE,
    Best,
    best_in,
    checkpoints_in,
    metrics_in,
    metrics_of,
    newest_checkpoint,
    step_of,
)
from disttrain.runs.latest import last_status, last_step
from disttrain.runs.losses import losses

# The journal's last status, in a person's words.
_STATES = {"RUNNING": "unfinished", "FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


def summarise(run: Path) -> dict[str, Any]:
    """The run's name, state, step, epoch, world size, lost workers, checkpoints and MLflow run, as JSON can hold them.

    The state is "finished", "stopped", "failed", "unfinished" (running, or killed) or "new". Step and
    epoch are those of the newest checkpoint. Reads whatever is there, damaged or not, and changes nothing.
    """
    paths = checkpoints_in(run / CHECKPOINTS)
    state = _read_json(paths[-1] / STATE) if paths else {}
    checkpoints = [_checkpoint(path) for path in paths]
    status = last_status(run / JOURNAL)
    lost_ranks, lost_seconds = losses(run / JOURNAL)
    return {
        "name": run.name,
        "state": "new" if status is None else _STATES.get(status, "unfinished"),
        "step": state.get("step", 0),
        "total_steps": state.get("total_steps"),
        "epoch": state.get("epoch", 0),
        "metrics": metrics_in(state),
        "accuracy": metrics_in(state).get("accuracy"),
        "best": _best(best_in(state), checkpoints),
        "world_size": state.get("world_size"),
        "lost_workers": {"ranks": lost_ranks, "seconds": lost_seconds},
        "checkpoints": checkpoints,
        "mlflow_run_id": _read_json(run / DELIVERED).get("run_id"),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    metrics = metrics_of(path)
    return {"path": str(path), "step": step_of(path), "accuracy": metrics.get("accuracy"), "metrics": metrics}


def _best(best: Best, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """The metric that decides, and the step of the best checkpoint there is, of equal ones the first.

    None if none was evaluated.
    """
    scored = [(-score, one["step"]) for one in checkpoints if (score := best.score(one["metrics"])) is not None]
    return {"metric": best.metric, "mode": best.mode, "step": min(scored)[1] if scored else None}


def newest_step(run: Path) -> int | None:
    """The newest step that the run's checkpoints or the last metrics of its journal know, 0 if there is none.

    None where no run can be seen. Not the journal's highest: one wrong digit in a line must not make every later
    failure look like a standstill.
    """
    if not run.is_dir():
        return None
    newest = newest_checkpoint(run)
    return max(last_step(run / JOURNAL), step_of(newest) if newest else 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
