"""A job as the objects that a cluster is asked for: those of k8s/base, with the fields of the request set."""

from __future__ import annotations

from typing import Any

from disttrain.layout import DEVICE
from disttrain_launch.kubernetes import kinds, source
from disttrain_launch.kubernetes.places import HOME, PORT, RECIPES
from disttrain_launch.kubernetes.spec import JobRequest, Manifest


def render(request: JobRequest) -> list[Manifest]:
    """Every object of the job, in the order in which they are to be made; the job itself comes last."""
    base = source.base()
    objects = []
    if request.storage.create:
        objects.append(_claim(base["PersistentVolumeClaim"], request))
    objects += [_recipe(base["ConfigMap"], request), _network_policy(base["NetworkPolicy"], request)]
    if request.kind == "job":
        objects.append(_service(base["Service"], request))
    objects += kinds.convert(_job(base["Job"], request), request)
    if request.namespace is not None:
        for found in objects:
            found["metadata"]["namespace"] = request.namespace
    return objects


def _claim(claim: Manifest, request: JobRequest) -> Manifest:
    claim["metadata"]["name"] = request.storage.claim
    spec = claim["spec"]
    spec["accessModes"] = [request.storage.access_mode]
    spec["resources"]["requests"]["storage"] = request.storage.size
    if request.storage.storage_class is not None:
        spec["storageClassName"] = request.storage.storage_class
    return claim


def _recipe(config: Manifest, request: JobRequest) -> Manifest:
    config["metadata"] |= {"name": request.name, "labels": request.labels}
    config["data"] = {request.recipe.filename: request.recipe.text}
    return config


def _network_policy(policy: Manifest, request: JobRequest) -> Manifest:
    policy["metadata"] |= {"name": request.name, "labels": request.labels}
    policy["spec"]["podSelector"]["matchLabels"] = request.labels
    policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"] = request.labels
    return policy


def _service(service: Manifest, request: JobRequest) -> Manifest:
    service["metadata"] |= {"name": request.name, "labels": request.labels}
    service["spec"]["selector"] = request.labels
    return service


def _job(job: Manifest, request: JobRequest) -> Manifest:
    labels, spec = request.labels, job["spec"]
    if request.queue is not None:
        labels = labels | {"kueue.x-k8s.io/queue-name": request.queue}
    job["metadata"] |= {"name": request.name, "labels": labels}
    most = request.nodes[1]
    spec |= {
        "completions": most,
        "parallelism": most,
        "backoffLimitPerIndex": request.max_restarts,
        "suspend": request.queue is not None,  # Kueue starts it when there is room
        "ttlSecondsAfterFinished": request.ttl_s,
    }
    spec["template"]["metadata"]["labels"] = request.labels
    _set_pod(spec["template"]["spec"], request)
    return job


def _set_pod(pod: dict[str, Any], request: JobRequest) -> None:
    pod["subdomain"] = request.name
    pod["terminationGracePeriodSeconds"] = request.grace_period_s
    _place(pod, request)
    _set_volumes(pod, request)
    if request.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in request.pull_secrets]
    _set_container(pod["containers"][0], request)


def _place(pod: dict[str, Any], request: JobRequest) -> None:
    (spread,) = pod["topologySpreadConstraints"]
    if request.placement != "spread":
        del pod["topologySpreadConstraints"]
    spread |= {"topologyKey": request.topology_key, "labelSelector": {"matchLabels": request.labels}}
    if request.placement == "one-host":
        term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": request.labels}}
        pod["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    if request.node_selector:
        pod["nodeSelector"] = dict(request.node_selector)
    if request.resources.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def _set_volumes(pod: dict[str, Any], request: JobRequest) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    volumes["recipe"]["configMap"]["name"] = request.name
    volumes["shm"]["emptyDir"]["sizeLimit"] = request.resources.shm
    if request.storage.claim is None:
        del volumes["runs"]
        container = pod["containers"][0]
        container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "runs"]
        container["workingDir"] = HOME
    else:
        volumes["runs"]["persistentVolumeClaim"]["claimName"] = request.storage.claim
    pod["volumes"] = list(volumes.values())


def _set_container(container: dict[str, Any], request: JobRequest) -> None:
    resources = request.resources
    container["image"], container["imagePullPolicy"] = request.image, request.pull_policy
    container["args"] = _arguments(request)
    environment = {entry["name"]: entry for entry in container["env"]}
    threads = max(1, int(cores(resources.cpu)) // resources.workers)
    device = {DEVICE: "cuda"} if resources.gpus else {}
    for name, value in ({"OMP_NUM_THREADS": str(threads)} | device | request.environment).items():
        environment[name] = {"name": name, "value": value}
    container["env"] = list(environment.values())
    if request.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in request.secrets]
    asked = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.gpus:
        asked["nvidia.com/gpu"] = str(resources.gpus)
    asked |= resources.devices
    container["resources"] = {"requests": dict(asked), "limits": dict(asked)}


def _arguments(request: JobRequest) -> list[str]:
    fewest, most = request.nodes
    # Overrides come with the recipe they change, and a value that begins with a dash is never taken for an option.
    changes = [f"--override={_literal(override)}" for override in request.recipe.overrides]
    return [
        "node",
        f"{RECIPES}/{_literal(request.recipe.filename)}",
        *changes,
        f"--nodes={most}" if fewest == most else f"--nodes={fewest}:{most}",
        f"--num-workers={request.resources.workers}",
        f"--node-rank=$({kinds.RANK_VARIABLE[request.kind]})",
        "--local-addr=$(POD_IP)",
        f"--rendezvous={request.first_pod}:{PORT}",
        f"--job-id={request.name}",
        f"--run-dir={_literal(request.storage.run_dir)}",
        f"--max-restarts={request.max_restarts}",
        f"--stop-grace={request.stop_grace_s}",
    ]


def _literal(text: str) -> str:
    """As a container's argument, in which Kubernetes fills in `$(NAME)` and reads `$$` as `$`."""
    return text.replace("$", "$$")


def cores(quantity: str) -> float:
    """A CPU quantity as a number of cores."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
