"""The one place where manifests become requests."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from disttrain_launch.kubernetes import checks
from disttrain_launch.kubernetes.client import WORKLOADS, Cluster
from disttrain_launch.kubernetes.kinds import APIS, PARTS, Api
from disttrain_launch.kubernetes.places import Kind
from disttrain_launch.kubernetes.spec import JobRequest, Manifest
from disttrain_launch.kubernetes.states import finished

CLAIM = PARTS["PersistentVolumeClaim"]
_OUTLIVES_THE_JOB = {"PersistentVolumeClaim"}


def submit(cluster: Cluster, manifests: list[Manifest]) -> None:
    """Make the objects, all or, as far as the server can check beforehand, none."""
    for manifest in manifests:
        # Kubeflow looks for a TrainJob's runtime, which a dry run does not make.
        if manifest["kind"] != "TrainJob":
            cluster.apply(manifest, dry_run=True)
    applied = [cluster.apply(manifest) for manifest in manifests]
    owner = _reference(applied[-1])
    for manifest in manifests[:-1]:
        if manifest["kind"] not in _OUTLIVES_THE_JOB:
            owned = copy.deepcopy(manifest)
            owned["metadata"]["ownerReferences"] = [owner]  # they are deleted with the job, however that happens
            cluster.apply(owned)


def refuse_what_does_not_fit(cluster: Cluster, request: JobRequest, manifests: list[Manifest]) -> None:
    """Check what the cluster has already. Raises ConfigurationError, a line for each mistake."""
    from disttrain.recipe import ConfigurationError

    lines = [*_claim(cluster, request), *_strangers(cluster, request, manifests), *_ended(cluster, request)]
    if lines:
        raise ConfigurationError("\n".join(lines))


def go_on(cluster: Cluster, job: Manifest) -> None:
    """An existing job in a queue is Kueue's to start: leave its suspension alone, and request it again."""
    kind = next(kind for kind, api in APIS.items() if api.kind == job["kind"])
    there = cluster.get(APIS[kind], job["metadata"]["name"])
    if there is not None and is_queued(there):
        (job["spec"]["runPolicy"] if kind == "pytorchjob" else job["spec"]).pop("suspend")
        _set_active(cluster, there, True)


def suspend(cluster: Cluster, kind: Kind, job: Manifest) -> None:
    """Ask for a checkpoint: the pods get SIGTERM and none takes their place until the job is submitted again."""
    if is_queued(job):
        _set_active(cluster, job, False)  # or Kueue would start it again at once
    change = {"runPolicy": {"suspend": True}} if kind == "pytorchjob" else {"suspend": True}
    cluster.patch(APIS[kind], job["metadata"]["name"], {"spec": change})


def is_queued(job: Manifest) -> bool:
    """Whether Kueue decides when it runs."""
    return "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})


def find(cluster: Cluster, name: str) -> tuple[Kind, Manifest]:
    """The job of that name, whatever its kind. Raises ConfigurationError if there is none."""
    from disttrain.recipe import ConfigurationError

    for kind, api in reversed(APIS.items()):  # a JobSet or TrainJob before the Jobs it makes
        job = cluster.get(api, name)
        if job is not None and is_ours(job, name):
            return kind, job
    raise ConfigurationError(
        f"namespace {cluster.namespace} has no job {name}; `disttrain k8s list` shows those it has"
    )


def is_ours(found: Manifest, name: str) -> bool:
    """Whether disttrain made the object for the job `name`."""
    labels = found["metadata"].get("labels", {})
    return (labels.get("app.kubernetes.io/name"), labels.get("app.kubernetes.io/instance")) == ("disttrain", name)


def _claim(cluster: Cluster, request: JobRequest) -> Iterator[str]:
    claim = request.storage.claim
    if claim is None:
        return
    found = cluster.get(CLAIM, claim)
    if found is None and not request.storage.create:
        yield f"--claim {claim}: namespace {cluster.namespace} has no such claim; leave --claim out to have one made"
    elif found is not None:
        what = (
            f"--claim {claim}: its mode is"
            if not request.storage.create
            else f"claim {claim} is there, and its mode is"
        )
        yield from checks.claim_mode_refusal(what, found["spec"]["accessModes"], request)


def _strangers(cluster: Cluster, request: JobRequest, manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        if manifest["kind"] in _OUTLIVES_THE_JOB:
            continue
        name = manifest["metadata"]["name"]
        found = cluster.get(PARTS[manifest["kind"]], name)
        if found is not None and not is_ours(found, request.name):
            yield f"--name {request.name}: {manifest['kind']} {name} exists and is not disttrain's; give another name"


def _ended(cluster: Cluster, request: JobRequest) -> Iterator[str]:
    job = cluster.get(APIS[request.kind], request.name)
    if job is not None and is_ours(job, request.name) and finished(job):
        yield (
            f"--name {request.name}: such a job has ended; remove it with `disttrain k8s stop {request.name} --now` "
            "(its run stays, and resumes from its checkpoint), or give another name"
        )


def _set_active(cluster: Cluster, job: Manifest, active: bool) -> None:
    for workload in cluster.find_all(WORKLOADS):
        owners = workload["metadata"].get("ownerReferences", [])
        if any(owner["uid"] == job["metadata"]["uid"] for owner in owners):
            cluster.patch(WORKLOADS, workload["metadata"]["name"], {"spec": {"active": active}})


def _reference(job: Manifest) -> dict[str, str]:
    api: Api = PARTS[job["kind"]]
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    return {"apiVersion": api.api_version, "kind": api.kind, "name": name, "uid": uid}


def delete(cluster: Cluster, kind: Kind, name: str) -> None:
    """Delete the job, its pods and what else was made for it; never the claim."""
    cluster.delete(APIS[kind], name)
    parts = ("Service", "ConfigMap", "NetworkPolicy", *(["TrainingRuntime"] if kind == "trainjob" else []))
    for part in parts:
        found = cluster.get(PARTS[part], name)
        if found is not None and is_ours(found, name):  # of `kubectl apply`, which sets no owners
            cluster.delete(PARTS[part], name)
