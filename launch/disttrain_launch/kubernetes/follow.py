"""A job followed to its end, and a job brought to its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from disttrain.errors import ExitCode
from disttrain_launch.kubernetes import submission
from disttrain_launch.kubernetes.client import PODS, Cluster
from disttrain_launch.kubernetes.kinds import APIS
from disttrain_launch.kubernetes.logs import LogFollower, pods_of
from disttrain_launch.kubernetes.places import Kind
from disttrain_launch.kubernetes.spec import Manifest, labels_of
from disttrain_launch.kubernetes.states import Pod, finished, pod_of, state_of, summary

_POLL_S = 1.0
_WATCH_S = 30

Say = Callable[[str], None]


def follow(
    cluster: Cluster, kind: Kind, name: str, say: Say, emit: Callable[[Pod, str], None], *, all_pods: bool
) -> int:
    """Report the job's state whenever that changes, and pass log lines to `emit`, until it ends.

    Args:
        all_pods: the logs of all pods, or of those with rank 0.

    Returns the job's exit code: 0, 75 if it was stopped, or that of the pod that failed; 1 if it could not be seen.
    """
    from disttrain.recipe import ConfigurationError

    logs, said, ended = LogFollower(cluster, emit), "", set[str]()
    codes: list[int] = []
    is_done = False  # a node ends with 0 only if the run is finished
    while True:
        try:
            seen = _look(cluster, kind, name, say)
        except ConfigurationError as error:
            say(f"{error}; the job itself is not affected. `disttrain k8s status {name}` shows its state")
            return ExitCode.FAILURE
        if seen is None:
            logs.finish()
            say("the job has been deleted")
            return 0 if is_done else ExitCode.FAILURE
        job, pods = seen
        logs.update([pod for pod in pods if all_pods or pod.is_first])
        for pod in pods:
            if pod.phase == "ended" and pod.name not in ended:
                ended.add(pod.name)
                codes += [pod.exit_code] if pod.exit_code else []
                is_done = is_done or pod.exit_code == 0
                if pod.exit_code != 0:
                    say(f"node {pod.node}: {pod.words}")
        line = summary(kind, job, pods)
        if line != said:
            say(line)
            said = line
        state = state_of(kind, job, pods)
        if state in ("complete", "failed", "suspended"):
            logs.finish()
            if state == "failed" and is_done:
                say("the run is finished: a node has trained it to its end, whatever became of the job")
                return 0
            return {"complete": 0, "suspended": ExitCode.STOPPED}.get(state, _worst(codes))
        time.sleep(_POLL_S)


def stop(cluster: Cluster, kind: Kind, job: Manifest, say: Say) -> bool:
    """Ask the job to save and stop, wait until its pods have ended, and report whether that is safe; whether it is."""
    from disttrain.recipe import DisttrainError

    name = job["metadata"]["name"]
    labels = labels_of(name)
    manifests, version = cluster.snapshot(PODS, labels)  # before asking, so that no end goes unseen
    submission.suspend(cluster, kind, job)
    live = _live(manifests)
    if not live:
        say("nothing was running; the job is suspended")
        return True
    say(f"asked {len(live)} nodes to save and stop")
    firsts = {pod.name for pod in live.values() if pod.is_first}
    try:
        codes = _watched_to_the_end(cluster, labels, version, live, say)
    except DisttrainError as error:
        say(f"{error}; the job was asked, but its end cannot be seen from here: see `disttrain k8s status {name}`")
        return False
    ends = [codes.get(pod_name) for pod_name in firsts]
    if ends and all(code is not None and ExitCode.is_safe(code) for code in ends):
        say(f"safe: the checkpoint is saved. `disttrain k8s submit` with the same arguments resumes it; "
            f"`disttrain k8s stop {name} --now` removes the job")  # fmt: skip
        return True
    if not ends or None in ends:
        say("the pods are gone, but how node 0 ended was not seen: look at the run's newest checkpoint")
    else:
        say("NOT saved: node 0 did not end by saving; the run resumes from an earlier checkpoint")
    return False


def _watched_to_the_end(
    cluster: Cluster, labels: dict[str, str], version: str, live: dict[str, Pod], say: Say
) -> dict[str, int]:
    """The exit codes of these pods, as far as they were seen, once none of the job's runs any more."""
    codes: dict[str, int] = {}
    while live:
        for change, manifest in cluster.watch(PODS, labels, since=version, for_s=_WATCH_S):
            pod = pod_of(manifest)
            if pod.exit_code is not None and pod.name in live and pod.name not in codes:
                codes[pod.name] = pod.exit_code
                say(f"node {pod.node}: {pod.words}")
            if pod.phase == "ended" or change == "DELETED":
                live.pop(pod.name, None)
            if not live:
                break
        if live:
            time.sleep(_POLL_S)  # the watch broke off
        manifests, version = cluster.snapshot(PODS, labels)
        live = _live(manifests)
    return codes


def _live(manifests: list[Manifest]) -> dict[str, Pod]:
    pods = map(pod_of, manifests)
    return {pod.name: pod for pod in pods if pod.phase != "ended"}


def _look(cluster: Cluster, kind: Kind, name: str, say: Say) -> tuple[Manifest, list[Pod]] | None:
    """The job and its pods; None once it is gone. A cluster that cannot be reached is retried.

    Raises ConfigurationError if it refuses, after reading the kubeconfig anew: a token may have expired.
    """
    from disttrain.recipe import ConfigurationError, DisttrainError

    complained = logged_in = False
    while True:
        try:
            # The pods first: a job that is then seen to have ended has its last pods in the list.
            pods = pods_of(cluster, labels_of(name))
            job = cluster.get(APIS[kind], name)
            if job is not None and finished(job):
                pods = pods_of(cluster, labels_of(name))
            return None if job is None else (job, pods)
        except ConfigurationError:
            if logged_in:
                raise
            cluster.log_in_again()
            logged_in = True
        except DisttrainError as error:
            if not complained:
                say(f"{error}; retrying")
                complained = True
            time.sleep(_POLL_S)


def _worst(codes: list[int]) -> int:
    is_cause = [code for code in codes if ExitCode.explains(code) or code == ExitCode.LOST]
    return (is_cause[:1] or codes[-1:] or [ExitCode.FAILURE])[0]
