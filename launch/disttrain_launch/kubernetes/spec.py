"""What a user asks of a cluster, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from disttrain_launch.kubernetes.places import Kind


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it travels: the file's name and text, and what the command line changes."""

    filename: str
    text: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one pod gets. Quantities are strings, as Kubernetes has them ("500m", "16Gi").

    Args:
        gpus: whole NVIDIA GPUs.
        workers: training processes.
        cpu, memory: requested and limited alike, so that the pod is the last to be evicted.
        shm: the size of /dev/shm; it counts towards `memory`.
        devices: further devices by resource name, as in {"rdma/hca": "1"}.
    """

    gpus: int
    workers: int
    cpu: str
    memory: str
    shm: str
    devices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Where runs live: on a claim, or behind a URL.

    Args:
        run_dir: a folder under /runs, or a URL that fsspec opens.
        claim: the claim's name, mounted at /runs; None with a URL.
        create: whether the claim is made with the job, in the size, mode and class given.
    """

    run_dir: str
    claim: str | None
    create: bool
    size: str
    access_mode: str
    storage_class: str | None

    @property
    def is_url(self) -> bool:
        """Whether runs live behind a URL."""
        from disttrain.recipe.address import is_url

        return is_url(self.run_dir)


@dataclass(frozen=True)
class JobRequest:
    """A training job on a cluster.

    Args:
        nodes: the minimum and maximum number of pods that train together.
        placement: "spread" over machines, "one-host" for all on one, "any".
        stop_grace_s, grace_period_s: seconds for a checkpoint after SIGTERM, and until SIGKILL.
        ttl_s: seconds for which a finished job stays, with its logs.
    """

    recipe: RecipeFile
    kind: Kind
    name: str
    namespace: str | None
    image: str
    pull_policy: str
    pull_secrets: tuple[str, ...]
    nodes: tuple[int, int]
    resources: Resources
    storage: Storage
    queue: str | None = None
    secrets: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    placement: str = "spread"
    topology_key: str = "kubernetes.io/hostname"
    max_restarts: int = 3
    stop_grace_s: int = 90
    grace_period_s: int = 120
    ttl_s: int = 604800

    @property
    def labels(self) -> dict[str, str]:
        """What every object and pod of the job carries."""
        return labels_of(self.name)

    @property
    def first_pod(self) -> str:
        """The name under which the others find the first pod, which hosts the rendezvous."""
        return {
            "job": f"{self.name}-0.{self.name}",
            "jobset": f"{self.name}-node-0-0.{self.name}",
            "trainjob": f"{self.name}-node-0-0.{self.name}",
            "pytorchjob": f"{self.name}-master-0",
        }[self.kind]

    @property
    def longest_hostname(self) -> str:
        """The name of the last pod."""
        last = self.nodes[1] - 1
        return {
            "job": f"{self.name}-{last}",
            "jobset": f"{self.name}-node-0-{last}",
            "trainjob": f"{self.name}-node-0-{last}",
            "pytorchjob": f"{self.name}-worker-{max(0, last - 1)}",
        }[self.kind]


def labels_of(name: str) -> dict[str, str]:
    """The labels of the job `name`."""
    return {"app.kubernetes.io/name": "disttrain", "app.kubernetes.io/instance": name}


Manifest = dict[str, Any]
