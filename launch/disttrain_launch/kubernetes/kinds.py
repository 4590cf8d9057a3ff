"""The same job in the shapes that other controllers take: JobSet, Kubeflow's TrainJob and its PyTorchJob."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from disttrain_launch.kubernetes.places import Kind
from disttrain_launch.kubernetes.spec import JobRequest, Manifest

# The label that numbers the pods from 0.
RANK_VARIABLE: dict[Kind, str] = {
    "job": "JOB_COMPLETION_INDEX",
    "jobset": "JOB_COMPLETION_INDEX",
    "trainjob": "JOB_COMPLETION_INDEX",
    "pytorchjob": "RANK",
}


@dataclass(frozen=True)
class Api:
    """Where a cluster serves a kind."""

    group: str
    version: str
    kind: str
    plural: str

    @property
    def api_version(self) -> str:
        """As it stands in a manifest."""
        return f"{self.group}/{self.version}" if self.group else self.version


APIS: dict[Kind, Api] = {
    "job": Api("batch", "v1", "Job", "jobs"),
    "jobset": Api("jobset.x-k8s.io", "v1alpha2", "JobSet", "jobsets"),
    "trainjob": Api("trainer.kubeflow.org", "v1alpha1", "TrainJob", "trainjobs"),
    "pytorchjob": Api("kubeflow.org", "v1", "PyTorchJob", "pytorchjobs"),
}
PARTS: dict[str, Api] = {
    api.kind: api
    for api in (
        *APIS.values(),
        Api("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime", "trainingruntimes"),
        Api("", "v1", "Service", "services"),
        Api("", "v1", "ConfigMap", "configmaps"),
        Api("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
        Api("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    )
}


def convert(job: Manifest, request: JobRequest) -> list[Manifest]:
    """The Job as the objects of the kind that was asked for, the one that starts everything last."""
    if request.kind == "job":
        return [job]
    # Their controllers make the Service themselves, and would fight about these.
    job["spec"]["template"]["spec"].pop("subdomain")
    if request.kind == "jobset":
        return [_jobset(job, request)]
    if request.kind == "trainjob":
        return _trainjob(job, request)
    return [_pytorchjob(job, request)]


def _head(api: Api, job: Manifest) -> Manifest:
    return {"apiVersion": api.api_version, "kind": api.kind, "metadata": copy.deepcopy(job["metadata"])}


def _replicated_job(job: Manifest, request: JobRequest) -> dict[str, Any]:
    spec = {key: value for key, value in job["spec"].items() if key not in ("suspend", "ttlSecondsAfterFinished")}
    return {"name": "node", "replicas": 1, "template": {"metadata": {"labels": request.labels}, "spec": spec}}


def _jobset(job: Manifest, request: JobRequest) -> Manifest:
    spec = {
        "suspend": job["spec"]["suspend"],
        "ttlSecondsAfterFinished": request.ttl_s,
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": request.name},
        # The Job inside tries each node again; what it gives up on, another set of pods would fail at as well.
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [_replicated_job(job, request)],
    }
    return _head(APIS["jobset"], job) | {"spec": spec}


def _trainjob(job: Manifest, request: JobRequest) -> list[Manifest]:
    """A runtime of our own, so that the pods are ours whatever the cluster offers, and the job that uses it."""
    replicated = _replicated_job(job, request)
    replicated["template"]["metadata"]["labels"] |= {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    runtime = _head(PARTS["TrainingRuntime"], job) | {
        "spec": {
            "mlPolicy": {"numNodes": request.nodes[1]},
            "template": {
                "spec": {
                    "network": {"publishNotReadyAddresses": True},
                    "failurePolicy": {"maxRestarts": 0},
                    "replicatedJobs": [replicated],
                }
            },
        }
    }
    runtime["metadata"]["labels"] = request.labels  # the queue is the job's business
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": request.name}
    spec = {
        "suspend": job["spec"]["suspend"],
        "runtimeRef": reference,
        "trainer": {"numNodes": request.nodes[1]},
    }
    return [runtime, _head(APIS["trainjob"], job) | {"spec": spec}]


def _pytorchjob(job: Manifest, request: JobRequest) -> Manifest:
    """Its policies do not distinguish exit codes: any failure is retried, `backoffLimit` times."""
    template = job["spec"]["template"]
    template["spec"].pop("restartPolicy")
    # Its controller finds the container by this name.
    template["spec"]["containers"][0]["name"] = "pytorch"
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": template}}
    if request.nodes[1] > 1:
        worker = {"replicas": request.nodes[1] - 1, "restartPolicy": "OnFailure", "template": copy.deepcopy(template)}
        replicas["Worker"] = worker
    spec = {
        "runPolicy": {
            "suspend": job["spec"]["suspend"],
            "backoffLimit": request.max_restarts,
            "cleanPodPolicy": "None",  # finished pods keep their logs
            "ttlSecondsAfterFinished": request.ttl_s,
        },
        "pytorchReplicaSpecs": replicas,
    }
    return _head(APIS["pytorchjob"], job) | {"spec": spec}
