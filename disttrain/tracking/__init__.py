"""The record of a run: the journal, which is authoritative, and MLflow, which is fed from it."""

from disttrain.runs.journal import Journal, read_journal
from disttrain.runs.latest import last_status
from disttrain.runs.redact import redact
from disttrain.tracking.mlflow.delivery_state import Backlog, DeliveryState, backlog_of, load_state
from disttrain.tracking.mlflow.sender import MlflowSender, deliver
from disttrain.tracking.mlflow.server_uri import how_to_open, resolve_uri
from disttrain.tracking.system import SYSTEM_METRICS, SystemSampler, node_metrics
from disttrain.tracking.tracker import Tracker, sync_command

__all__ = [
    "SYSTEM_METRICS",
    "Backlog",
    "DeliveryState",
    "Journal",
    "MlflowSender",
    "SystemSampler",
    "Tracker",
    "backlog_of",
    "deliver",
    "how_to_open",
    "last_status",
    "load_state",
    "node_metrics",
    "read_journal",
    "redact",
    "resolve_uri",
    "sync_command",
]
