"""`disttrain k8s render|submit|status|logs|stop|list`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from disttrain.commands.options import dry_run_option, json_option
from disttrain_launch.kubernetes.options import job_options, request_of

if TYPE_CHECKING:
    from disttrain_launch.kubernetes.places import Kind
    from disttrain_launch.kubernetes.spec import Manifest
    from disttrain_launch.kubernetes.states import Pod

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _cluster_options(function: _Function) -> _Function:
    namespace = click.option("--namespace", help="The namespace (default: that of the context).")
    return namespace(_context_option(function))


def _context_option(function: _Function) -> _Function:
    return click.option("--context", help="The context of the kubeconfig (default: the current one).")(function)


@click.group()
def k8s() -> None:
    """Train on Kubernetes."""


@k8s.command()
@job_options
def render(**given: Any) -> None:
    """Print the manifests of a job that trains RECIPE, for `kubectl apply -f -`."""
    from disttrain_launch.kubernetes import manifest, source

    click.echo(source.to_yaml(manifest.render(request_of(**given))), nl=False)


@k8s.command()
@job_options
@_context_option
@dry_run_option
@click.option("--follow", "then_follow", is_flag=True, help="Show the job's progress; Ctrl-C detaches.")
def submit(context: str | None, dry_run: bool, then_follow: bool, **given: Any) -> None:
    """Start a job that trains RECIPE, or resume one that was stopped."""
    from disttrain_launch.kubernetes import manifest, source, submission

    request = request_of(**given)
    manifests = manifest.render(request)
    if dry_run:
        click.echo(source.to_yaml(manifests), nl=False)
        return
    cluster = _open(context, request.namespace)
    submission.refuse_what_does_not_fit(cluster, request, manifests)
    submission.go_on(cluster, manifests[-1])
    submission.submit(cluster, manifests)
    click.echo(f"{request.kind} {request.name} is submitted to namespace {cluster.namespace}")
    if then_follow:
        _follow(cluster, request.kind, request.name, all_pods=False)
    else:
        click.echo(f"disttrain k8s logs {request.name}    follows it")


@k8s.command()
@click.argument("name")
@_cluster_options
@json_option
def status(name: str, context: str | None, namespace: str | None, as_json: bool) -> None:
    """Show the state of the job NAME and of each of its pods."""
    from disttrain_launch.kubernetes import submission

    cluster = _open(context, namespace)
    kind, job = submission.find(cluster, name)
    report = _report(cluster, kind, job)
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(report["summary"])
    for pod in report["pods"]:
        click.echo(f"  node {pod['node']}  {pod['name']}  {pod['words']}")


@k8s.command("list")
@_cluster_options
@json_option
def list_jobs(context: str | None, namespace: str | None, as_json: bool) -> None:
    """List the jobs of a namespace."""
    from disttrain_launch.kubernetes.kinds import APIS

    cluster = _open(context, namespace)
    labels = {"app.kubernetes.io/name": "disttrain"}
    found = [(kind, job) for kind, api in APIS.items() for job in cluster.find_all(api, labels) if not _has_owner(job)]
    reports = [_report(cluster, kind, job) for kind, job in found]
    if as_json:
        click.echo(json.dumps({"jobs": reports}))
        return
    width = max((len(report["name"]) for report in reports), default=0)
    for report in reports:
        click.echo(f"{report['name']:{width}}  {report['summary']}")
    if not reports:
        click.echo(f"namespace {cluster.namespace} has no jobs", err=True)


@k8s.command()
@click.argument("name")
@click.option("--node", type=click.IntRange(0), help="Only this node's.")
@click.option("--no-follow", is_flag=True, help="Print what is there now, and return.")
@_cluster_options
def logs(name: str, node: int | None, no_follow: bool, context: str | None, namespace: str | None) -> None:
    """Show what every pod of the job NAME prints, each line behind its node's number."""
    from disttrain_launch.kubernetes import follow, submission
    from disttrain_launch.kubernetes.logs import pods_of
    from disttrain_launch.kubernetes.spec import labels_of

    def emit(pod: Pod, line: str) -> None:
        if node in (None, pod.node):
            click.echo(f"node {pod.node} | {line}")

    cluster = _open(context, namespace)
    kind, _ = submission.find(cluster, name)
    if no_follow:
        for pod in pods_of(cluster, labels_of(name)):
            if node in (None, pod.node):
                for line in cluster.log(pod.name, follow=False):
                    emit(pod, line.partition(" ")[2])
        return
    try:
        follow.follow(cluster, kind, name, _say, emit, all_pods=True)
    except KeyboardInterrupt:
        _detach(name)


@k8s.command()
@click.argument("name")
@click.option("--now", is_flag=True, help="Delete the job and its pods, saved or not. The run and its claim stay.")
@_cluster_options
def stop(name: str, now: bool, context: str | None, namespace: str | None) -> None:
    """Ask the job NAME to save a checkpoint and stop, and report when it is safe."""
    from disttrain_launch.kubernetes import follow, submission
    from disttrain_launch.kubernetes.states import finished

    cluster = _open(context, namespace)
    kind, job = submission.find(cluster, name)
    if now:
        submission.delete(cluster, kind, name)
        click.echo(f"job {name} is being deleted with its pods; the run and its checkpoints stay")
        return
    if finished(job):
        click.echo(f"job {name} has already ended; `disttrain k8s stop {name} --now` removes it")
        return
    if not follow.stop(cluster, kind, job, click.echo):
        sys.exit(1)


def _open(context: str | None, namespace: str | None) -> Any:
    from disttrain_launch.kubernetes.client import Cluster

    return Cluster(context, namespace)


def _report(cluster: Any, kind: Kind, job: Manifest) -> dict[str, Any]:
    from disttrain_launch.kubernetes import states
    from disttrain_launch.kubernetes.logs import pods_of
    from disttrain_launch.kubernetes.spec import labels_of

    name = job["metadata"]["name"]
    pods = pods_of(cluster, labels_of(name))
    return {
        "name": name,
        "kind": kind,
        "namespace": cluster.namespace,
        "state": states.state_of(kind, job, pods),
        "summary": states.summary(kind, job, pods),
        "nodes": states.num_nodes(kind, job),
        "running": sum(pod.phase == "running" for pod in pods),
        "pods": [asdict(pod) for pod in pods],
    }


def _follow(cluster: Any, kind: Kind, name: str, *, all_pods: bool) -> None:
    from disttrain_launch.kubernetes import follow

    try:
        code = follow.follow(cluster, kind, name, _say, lambda _pod, line: click.echo(line), all_pods=all_pods)
    except KeyboardInterrupt:
        _detach(name)
        return
    sys.exit(code)


def _detach(name: str) -> None:
    _say(f"detached; the job continues. `disttrain k8s logs {name}` follows it, `disttrain k8s stop {name}` ends it")


def _say(line: str) -> None:
    click.echo(f"disttrain: {line}", err=True)


def _has_owner(job: Manifest) -> bool:
    return any(owner.get("controller") for owner in job["metadata"].get("ownerReferences", []))
