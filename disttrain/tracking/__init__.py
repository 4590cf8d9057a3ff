"""The account of a run: the journal, which is the truth, and MLflow, which is fed from it."""

from disttrain.tracking.delivery_state import DeliveryState, Owed, load_state, owed
from disttrain.tracking.journal import JOURNAL_FILE, Journal, read_journal
from disttrain.tracking.mlflow_sender import MlflowSender, deliver
from disttrain.tracking.redact import redact
from disttrain.tracking.server_uri import how_to_open, resolve_uri
from disttrain.tracking.system import SYSTEM_METRICS, SystemSampler, node_metrics
from disttrain.tracking.tracker import NullTracker, Tracker

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
    "load_state",
    "node_metrics",
    "owed",
    "read_journal",
    "redact",
    "resolve_uri",
]
