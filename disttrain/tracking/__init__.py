"""The account of a run: the journal, which is the truth, and MLflow, which is fed from it."""

from disttrain.tracking.delivery_state import DeliveryState, Owed, load_state, owed
from disttrain.tracking.journal import JOURNAL_FILE, Journal, last_status, read_journal
from disttrain.tracking.mlflow_sender import MlflowSender, deliver
from disttrain.tracking.redact import redact
from disttrain.tracking.server_uri import how_to_open, resolve_uri
from disttrain.tracking.system import SYSTEM_METRICS, SystemSampler, node_metrics
from disttrain.tracking.tracker import NullTracker, Tracker, sync_command

__all__ = [
    "JOURNAL_FILE",
    "SYSTEM_METRICS",
    "DeliveryState",
    "Journal",
    "MlflowSender",
    "NullTracker",
    "Owed",
    "SystemSampler",
    "Tracker",
    "deliver",
    "how_to_open",
    "last_status",
    "load_state",
    "node_metrics",
    "owed",
    "read_journal",
    "redact",
    "resolve_uri",
    "sync_command",
]
