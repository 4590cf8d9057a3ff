"""What `disttrain k8s` needs to be allowed in a namespace, asked of the cluster itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain_launch.kubernetes.client import Cluster

# (what for, API group, resource, verbs), in the order in which a job needs them.
_NEEDED = (
    ("submit", "batch", "jobs", ("create", "patch", "get")),
    ("submit", "", "services", ("create", "patch")),
    ("submit", "", "configmaps", ("create", "patch")),
    ("submit", "", "persistentvolumeclaims", ("create", "patch", "get")),
    ("submit", "networking.k8s.io", "networkpolicies", ("create", "patch")),
    ("status", "batch", "jobs", ("list", "watch")),
    ("status", "", "pods", ("list", "watch")),
    ("status", "", "events", ("list",)),
    ("logs", "", "pods/log", ("get",)),
    ("stop", "batch", "jobs", ("patch", "delete")),
)


def permissions(context: str | None, namespace: str | None) -> list[dict[str, Any]]:
    """For each command whether it has what it needs, as `disttrain doctor` reports: name, status, detail, remedy."""
    from disttrain.recipe import DisttrainError
    from disttrain_launch.kubernetes.client import Cluster

    try:
        cluster = Cluster(context, namespace)
        return [_found(cluster, command) for command in dict.fromkeys(needed[0] for needed in _NEEDED)]
    except DisttrainError as error:
        remedy = "See that `kubectl auth whoami` works with this KUBECONFIG and context."
        return [{"name": "kubernetes", "status": "failure", "detail": str(error), "remedy": remedy}]


def _found(cluster: Cluster, command: str) -> dict[str, Any]:
    missing = [
        f"{verb} {resource}"
        for needed_by, group, resource, verbs in _NEEDED
        if needed_by == command
        for verb in verbs
        if not cluster.may(verb, group, resource)
    ]
    place = f"namespace {cluster.namespace}"
    if missing:
        return {
            "name": f"k8s-{command}",
            "status": "failure",
            "detail": f"in {place} you may not {', '.join(missing)}",
            "remedy": f"`disttrain k8s {command}` needs that: ask the cluster's administrator for a Role that allows "
            "it.",
        }
    return {"name": f"k8s-{command}", "status": "ok", "detail": f"allowed in {place}", "remedy": ""}
