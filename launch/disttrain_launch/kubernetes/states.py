"""The state of a cluster's objects, in words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from disttrain.errors import ExitCode
from disttrain_launch.kubernetes.places import Kind
from disttrain_launch.kubernetes.spec import Manifest

_ENDINGS: dict[int, str] = {
    ExitCode.DONE: "done",
    ExitCode.FAILURE: "failed (exit 1)",
    ExitCode.USAGE: "wrong command line (exit 2)",
    ExitCode.DIVERGED: "diverged (exit 70)",
    ExitCode.LOST: "lost a worker (exit 71)",
    ExitCode.STOPPED: "stopped, checkpoint saved (exit 75)",
    ExitCode.CONFIGURATION: "wrong recipe, data or environment (exit 78)",
    137: "killed (exit 137: out of memory, or longer than the grace period)",
    143: "ended by SIGTERM before it could save (exit 143)",
}
_INDEX = ("batch.kubernetes.io/job-completion-index", "training.kubeflow.org/replica-index")
_STARTING = {"ContainerCreating", "PodInitializing"}


@dataclass(frozen=True)
class Pod:
    """One pod: its number among the nodes, its phase, and its state in words."""

    name: str
    node: int
    phase: str  # waiting, starting, running, ended
    words: str
    exit_code: int | None
    created: str

    @property
    def is_first(self) -> bool:
        """Whether it hosts rank 0."""
        return self.node == 0


def pod_of(pod: Manifest, events: list[Manifest] | None = None) -> Pod:
    """What a pod does."""
    phase, words, exit_code = _phase(pod, events or [])
    if "deletionTimestamp" in pod["metadata"] and phase != "ended":
        words = "stopping"
    metadata = pod["metadata"]
    return Pod(metadata["name"], _node(metadata), phase, words, exit_code, metadata.get("creationTimestamp", ""))


def finished(job: Manifest) -> str | None:
    """ "Complete" or "Failed" once the job has ended for good."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Completed", "Succeeded"):
            return "Complete"
        if condition["status"] == "True" and condition["type"] == "Failed":
            return "Failed"
    return None


def reason(job: Manifest) -> str:
    """Why it failed, in the cluster's words."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c.get("message", "") for c in conditions if c["type"] == "Failed" and c["status"] == "True"), "")


def is_suspended(kind: Kind, job: Manifest) -> bool:
    """Whether it has been asked to have no pods."""
    spec = job["spec"]
    return bool((spec.get("runPolicy", {}) if kind == "pytorchjob" else spec).get("suspend"))


def num_nodes(kind: Kind, job: Manifest) -> int:
    """How many pods it wants."""
    spec = job["spec"]
    if kind == "job":
        return int(spec["completions"])
    if kind == "jobset":
        return int(spec["replicatedJobs"][0]["template"]["spec"]["completions"])
    if kind == "trainjob":
        return int(spec["trainer"]["numNodes"])
    return sum(int(replicas["replicas"]) for replicas in spec["pytorchReplicaSpecs"].values())


def state_of(kind: Kind, job: Manifest, pods: list[Pod]) -> str:
    """One word: complete, failed, stopping, suspended, queued, running or waiting."""
    ended = finished(job)
    if ended is not None:
        return ended.lower()
    live = [pod for pod in pods if pod.phase != "ended"]
    if is_suspended(kind, job):
        if live:
            return "stopping"
        return "queued" if "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {}) else "suspended"
    up = sum(pod.phase == "running" for pod in live) + sum(pod.exit_code == 0 for pod in pods)
    return "running" if up >= num_nodes(kind, job) else "waiting"


def summary(kind: Kind, job: Manifest, pods: list[Pod]) -> str:
    """One line, as in "waiting: 2 of 4 nodes, insufficient nvidia.com/gpu"."""
    state = state_of(kind, job, pods)
    if state == "failed":
        return f"failed: {reason(job)}".rstrip(": ")
    if state in ("complete", "suspended", "queued"):
        return {"queued": "queued: Kueue has not admitted it yet"}.get(state, state)
    wanted = num_nodes(kind, job)
    running = len({pod.node for pod in pods if pod.phase == "running" or pod.exit_code == 0})
    others = [pod.words for pod in pods if pod.phase in ("waiting", "starting")]
    reasons = [words if count == 1 else f"{count} times {words}" for words, count in Counter(others).items()]
    return ", ".join([f"{state}: {running} of {wanted} nodes", *reasons])


def _node(metadata: dict[str, Any]) -> int:
    labels = metadata.get("labels", {}) | metadata.get("annotations", {})
    number = next((int(labels[name]) for name in _INDEX if name in labels), 0)
    # PyTorchJob numbers its workers from 0 again, behind the master.
    return number + int(labels.get("training.kubeflow.org/replica-type") == "worker")


def _phase(pod: Manifest, events: list[Manifest]) -> tuple[str, str, int | None]:
    status = pod.get("status", {})
    containers = status.get("containerStatuses", [])
    state = containers[0].get("state", {}) if containers else {}
    if "terminated" in state:
        code = int(state["terminated"]["exitCode"])
        disrupted = [
            c for c in status.get("conditions", []) if c["type"] == "DisruptionTarget" and c["status"] == "True"
        ]
        words = _ENDINGS.get(code, f"exit {code}")
        if state["terminated"].get("reason") == "OOMKilled":
            words = "out of memory (exit 137): give more --memory"
        elif disrupted and not ExitCode.is_safe(code):
            words = f"disrupted: {disrupted[0].get('reason', 'node lost')}"
        return "ended", words, code
    if status.get("phase") in ("Failed", "Succeeded"):
        return "ended", f"{status.get('reason', status['phase'])} {status.get('message', '')}".strip(), None
    if "running" in state:
        return "running", "running", None
    if "waiting" in state:
        return _waiting(pod, state["waiting"], events)
    return "waiting", _unscheduled(status), None


def _waiting(pod: Manifest, waiting: dict[str, Any], events: list[Manifest]) -> tuple[str, str, None]:
    why, image = waiting.get("reason", ""), pod["spec"]["containers"][0]["image"]
    if why in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
        return "waiting", f"cannot pull {image}: {_first_line(waiting.get('message', why))}", None
    if why in _STARTING or not why:
        newest = events[-1] if events else {}
        if newest.get("reason") == "Pulling":
            return "starting", f"pulling {image}", None
        if newest.get("type") == "Warning":  # a volume that cannot be mounted, a claim on another machine
            return "waiting", _first_line(newest.get("message", "")), None
        return "starting", "starting", None
    return "waiting", f"{why}: {_first_line(waiting.get('message', ''))}".rstrip(": "), None


def _unscheduled(status: dict[str, Any]) -> str:
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = condition.get("message", "")
            lacking = sorted(set(re.findall(r"Insufficient ([\w./-]+[\w])", message)))
            return f"insufficient {', '.join(lacking)}" if lacking else _first_line(message) or "not scheduled"
    return "not scheduled yet"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
