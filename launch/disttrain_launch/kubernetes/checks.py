"""What can be checked of a request before anything is sent: one line for each mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from disttrain_launch.kubernetes.places import RUNS
from disttrain_launch.kubernetes.quantities import amount
from disttrain_launch.kubernetes.spec import JobRequest

if TYPE_CHECKING:
    from disttrain.recipe import Recipe

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, which Services want: no digit in front
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUALIFIED = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][\w.:/@+-]*")
_MOST_NODES, _LONGEST = 1000, 63
_LEAST_BYTES = 2**20  # less is a forgotten unit
_TO_END_S = 10  # what a worker needs after its checkpoint to exit
_SETS_ITSELF = {"POD_IP", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def check(request: JobRequest, recipe: Recipe) -> None:
    """Raises UsageError with a line for each mistake in the request."""
    from disttrain.recipe import UsageError

    lines = [
        *_texts(request),
        *_names(request),
        *_image(request),
        *_sizes(request),
        *_ranges(request, recipe),
        *_storage(request),
        *_environment(request),
    ]
    if lines:
        raise UsageError("\n".join(lines))


def _texts(request: JobRequest) -> Iterator[str]:
    from disttrain.recipe.address import is_text

    given = {"--run-dir": request.storage.run_dir, "--env": " ".join(request.environment.values())}
    for option, text in given.items():
        if not is_text(text):
            yield f"{option} {text}: is not UTF-8, and manifests are text; give another name"


def _names(request: JobRequest) -> Iterator[str]:
    name = request.name
    if not _LABEL.fullmatch(name):
        yield (
            f"--name {name}: should be lower-case letters, digits and dashes, a letter in front, no dash at the end; "
            "it becomes a DNS name"
        )
    elif len(request.longest_hostname) > _LONGEST:
        room = len(name) - (len(request.longest_hostname) - _LONGEST)
        yield f"--name {name}: its last pod would be {request.longest_hostname}, and a host name has at most 63 " \
              f"characters; give a name of at most {room}"  # fmt: skip
    if request.namespace is not None and not (_is_dns_label(request.namespace)):
        yield f"--namespace {request.namespace}: should be lower-case letters, digits and dashes, at most 63"
    if request.queue is not None and not _is_subdomain(request.queue):
        yield f"--queue {request.queue}: is not the name of a Kueue LocalQueue"
    for secret in request.secrets:
        if not _is_subdomain(secret):
            yield f"--secret {secret}: is not the name of a Secret; give the name, not the password"
    for secret in request.pull_secrets:
        if not _is_subdomain(secret):
            yield f"--pull-secret {secret}: is not the name of a Secret"


def _image(request: JobRequest) -> Iterator[str]:
    if not request.image:
        yield "--image is missing: give the image that has disttrain and your code, as k8s/Dockerfile builds it"
    elif not _IMAGE.fullmatch(request.image):
        yield f"--image {request.image}: is not an image reference, as in registry.example/team/disttrain:0.1.0"


def _sizes(request: JobRequest) -> Iterator[str]:
    resources = request.resources
    asked = {"--cpu": resources.cpu, "--memory": resources.memory, "--shm-size": resources.shm}
    if request.storage.create:
        asked["--claim-size"] = request.storage.size
    for option, quantity in asked.items():
        value = amount(quantity)
        if value is None or value <= 0:
            yield f"{option} {quantity}: is not a quantity; give a number with a unit, as in 2, 500m, 16Gi"
        elif option != "--cpu" and value < _LEAST_BYTES:
            yield f"{option} {quantity}: is {value:g} bytes; give a unit, as in {quantity.rstrip('m')}Gi"
    memory, shm = amount(resources.memory), amount(resources.shm)
    if memory and shm and shm >= memory >= _LEAST_BYTES:
        yield f"--shm-size {resources.shm}: counts towards --memory {resources.memory}; give less, or more memory"
    for device, quantity in resources.devices.items():
        if not _QUALIFIED.fullmatch(device):
            yield f"--rdma {device}={quantity}: {device} is not a device resource, as in rdma/hca=1"
        elif not quantity.isdecimal() or int(quantity) < 1:
            yield f"--rdma {device}={quantity}: should be a whole number of devices, 1 or more"


def _ranges(request: JobRequest, recipe: Recipe) -> Iterator[str]:
    fewest, most = request.nodes
    if not 1 <= fewest <= most <= _MOST_NODES:
        yield f"--nodes {fewest}:{most}: should be 1 to {_MOST_NODES} nodes, the fewest first"
    if fewest != most and request.kind != "job":
        yield f"--nodes {fewest}:{most}: --kind {request.kind} has a fixed number of nodes; give N, or --kind job"
    workers = most * request.resources.workers
    if recipe.parallel.exact and workers > recipe.parallel.slices:
        yield (
            f"--nodes {most}: {workers} workers, and in exact mode a step is shared by at most parallel.slices = "
            f"{recipe.parallel.slices}; give fewer, or more slices"
        )
    if request.resources.gpus and request.resources.workers > request.resources.gpus:
        yield f"--workers {request.resources.workers}: more than --gpus {request.resources.gpus}; give one per GPU"
    if request.grace_period_s < request.stop_grace_s + _TO_END_S:
        yield (
            f"--grace-period {request.grace_period_s}: the pod would be killed before its checkpoint is saved; give "
            f"at least {request.stop_grace_s + _TO_END_S} ({_TO_END_S} s more than --stop-grace), or less --stop-grace"
        )


def _storage(request: JobRequest) -> Iterator[str]:
    storage = request.storage
    if storage.is_url:
        if storage.claim is not None:
            yield f"--claim {storage.claim}: --run-dir {storage.run_dir} is a URL; give one of the two"
        return
    parts = storage.run_dir.split("/")
    if not storage.run_dir.startswith(f"{RUNS}/") or ".." in parts or not parts[2]:
        yield f"--run-dir {storage.run_dir}: should be a folder in {RUNS}, where the claim is mounted, or a URL; all " \
              "else is lost with the pod"  # fmt: skip
    if storage.claim is not None and not _is_subdomain(storage.claim):
        yield f"--claim {storage.claim}: is not the name of a PersistentVolumeClaim"
    if storage.create and request.nodes[1] > 1:
        yield from claim_mode_refusal("--access-mode", [storage.access_mode], request)


def claim_mode_refusal(what: str, modes: list[str], request: JobRequest) -> Iterator[str]:
    """A line if pods on several machines cannot mount a claim of these modes."""
    if request.nodes[1] == 1 or "ReadWriteMany" in modes:
        return
    if "ReadWriteOncePod" in modes or request.placement != "one-host":
        yield (
            f"{what} {', '.join(modes)}: {request.nodes[1]} nodes need ReadWriteMany; give such a claim, a URL as "
            "--run-dir, or --placement one-host with ReadWriteOnce"
        )


def _environment(request: JobRequest) -> Iterator[str]:
    for name in request.environment:
        if not _VARIABLE.fullmatch(name):
            yield f"--env {name}: is not the name of a variable"
        elif name in _SETS_ITSELF:
            yield f"--env {name}: disttrain sets it itself; leave it out"
        elif re.search("password|secret|token|_key$", name, re.IGNORECASE):
            yield f"--env {name}: would be readable in the manifest; put it into a Secret and give --secret NAME"


def _is_dns_label(text: str) -> bool:
    return len(text) <= _LONGEST and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", text) is not None


def _is_subdomain(text: str) -> bool:
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None
