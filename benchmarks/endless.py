"""A run that goes on until it is ended, for what is timed from outside."""

from __future__ import annotations

from pathlib import Path

_OPTIONS = {
    "tracking.uri": "none",
    "tracking.system_metrics": "false",
    "train.log_every_steps": "1",
    "train.epochs": "100000",
    "train.eval_every_epochs": "100000",
    "schedule.name": "constant",
    "checkpoint.every_steps": "1",
}
OVERRIDES = [word for key, value in _OPTIONS.items() for word in ("-o", f"{key}={value}")]


def newest_step(run_dir: Path) -> int:
    """How many steps the journal has."""
    journal = run_dir / "journal.jsonl"
    return journal.read_text().count('"train/loss"') if journal.exists() else 0
