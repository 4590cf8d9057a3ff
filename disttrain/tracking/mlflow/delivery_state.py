"""What MLflow has of a run, kept in the run directory as `mlflow.json`, and the backlog it has yet to receive."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disttrain.files import parse_json, read_text, replace_file
from disttrain.layout import DELIVERED, JOURNAL
from disttrain.runs.journal import count_records


@dataclass
class DeliveryState:
    """How far the delivery of a journal has come. Written by the process that delivers, once it has begun."""

    uri: str = ""  # without credentials
    experiment: str = ""
    experiment_id: str = ""
    run_id: str = ""
    offset: int = 0  # bytes of the journal that MLflow has
    uploads: list[dict[str, Any]] = field(default_factory=list)  # records behind the offset that wait for a file
    status: dict[str, Any] | None = None  # the run's new status, sent to MLflow after the uploads
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of what was uploaded, by place in MLflow

    def save(self, run_dir: Path) -> None:
        """Replace the file in one step. Raises OSError."""
        content = json.dumps(asdict(self), indent=1) + "\n"
        replace_file(run_dir / DELIVERED, content, temporary=run_dir / f".{DELIVERED}.{os.getpid()}")


def load_state(run_dir: str | os.PathLike[str]) -> DeliveryState:
    """The state of a run directory; a new one where there is none or it cannot be read.

    Nothing is lost by starting again at the journal's first line: MLflow keeps one copy of a row that comes twice, and
    the run is found again by the job's name.
    """
    try:
        stored = parse_json(read_text(Path(run_dir) / DELIVERED))
        state = DeliveryState(**stored)
    except (OSError, ValueError, TypeError):
        return DeliveryState()
    expected = DeliveryState()
    for name, value in asdict(expected).items():
        if name != "status" and not isinstance(getattr(state, name), type(value)):
            return expected
    return state if _is_sound(state) else expected


def _is_sound(state: DeliveryState) -> bool:
    status = state.status
    return (
        0 <= state.offset < 2**63
        and all(isinstance(record, dict) for record in state.uploads)
        and (status is None or (isinstance(status, dict) and isinstance(status.get("status"), str)))
        and all(isinstance(digest, str) for digest in state.files.values())
    )


def state_for(run_dir: Path, uri: str, experiment: str) -> DeliveryState:
    """The state of a run for this server (without credentials) and experiment; a new one if it had another.

    A new one is kept at once, if it can be, so that a later `disttrain sync` finds the server whatever happens until
    then.
    """
    state = load_state(run_dir)
    if (state.uri, state.experiment) != (uri, experiment):
        state = DeliveryState(uri=uri, experiment=experiment)
        with contextlib.suppress(OSError):
            state.save(run_dir)
    return state


@dataclass(frozen=True)
class Backlog:
    """What MLflow still lacks of a run. False when it has everything."""

    records: int = 0
    files: int = 0
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.records or self.files)

    def __str__(self) -> str:
        parts = [
            f"{number} {name}{'s' if number > 1 else ''}"
            for number, name in ((self.records, "journal record"), (self.files, "upload"))
            if number
        ]
        return " and ".join(parts) or "nothing"


def backlog_of(run_dir: str | os.PathLike[str], reason: str = "") -> Backlog:
    """Count what the journal holds and MLflow does not."""
    state = load_state(run_dir)
    records = count_records(Path(run_dir) / JOURNAL, state.offset)
    return Backlog(records, len(state.uploads) + (state.status is not None), reason)
