"""The logs of pods as they grow, across lost connections and replaced pods."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from disttrain_launch.kubernetes.client import PODS, Cluster, LostConnection
from disttrain_launch.kubernetes.states import Pod, pod_of

_PAUSE_S = 0.5


def lines_of(cluster: Cluster, pod: str, has_ended: Callable[[], bool], stopped: threading.Event) -> Iterator[str]:
    """Each line of the pod's log once, in order, until the pod has ended and all is read.

    After a lost connection the log is read from its beginning (a kubelet keeps 10 MiB by default) and what was seen is
    skipped, by its position while the log begins as it did, by its time once a kubelet has rotated it: clocks of
    this machine play no part, so nothing is lost or repeated.
    """
    num_seen, first, newest, rotated = 0, "", "", False
    while not stopped.is_set():
        had_ended = has_ended()  # asked before reading: what it wrote at its end is then read too
        try:
            for position, stamped in enumerate(cluster.log(pod, follow=True), start=1):
                if position == 1:
                    rotated = rotated or (first != "" and stamped != first)
                    first = stamped
                stamp, _, text = stamped.partition(" ")
                moment = stamp.rstrip("Z")
                if (moment <= newest) if rotated else (position <= num_seen):
                    continue
                num_seen, newest = position, moment
                yield text
            if had_ended:
                return
        except FileNotFoundError:
            return
        except LostConnection:
            pass  # and again
        stopped.wait(_PAUSE_S)


class LogFollower:
    """Reads the logs of many pods at once and gives each line to `emit`, one at a time."""

    def __init__(self, cluster: Cluster, emit: Callable[[Pod, str], None]) -> None:
        self._cluster, self._emit = cluster, emit
        self._ended: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}
        self._one_at_a_time = threading.Lock()
        self._stopped = threading.Event()

    def update(self, pods: list[Pod]) -> None:
        """Follow pods that have appeared; note which have ended or gone."""
        self._ended |= {pod.name for pod in pods if pod.phase == "ended"}
        self._ended |= set(self._threads) - {pod.name for pod in pods}
        for pod in pods:
            if pod.phase in ("running", "ended") and pod.name not in self._threads:
                # A daemon: Ctrl-C must not wait for a line that may never come.
                self._threads[pod.name] = threading.Thread(target=self._follow, args=(pod,), daemon=True)
                self._threads[pod.name].start()

    def finish(self, timeout_s: float = 10.0) -> None:
        """Wait for the logs of the pods that have ended to be read to their end."""
        for name in self._ended & set(self._threads):
            self._threads[name].join(timeout_s)
        self._stopped.set()

    def _follow(self, pod: Pod) -> None:
        for line in lines_of(self._cluster, pod.name, lambda: pod.name in self._ended, self._stopped):
            with self._one_at_a_time:
                self._emit(pod, line)


def pods_of(cluster: Cluster, labels: dict[str, str]) -> list[Pod]:
    """The job's pods, by node, the newest of each last; with events for those that do not start."""
    from disttrain_launch.kubernetes.client import EVENTS

    pods = []
    for manifest in cluster.find_all(PODS, labels):
        pod = pod_of(manifest)
        if pod.phase == "starting":
            events = cluster.find_all(EVENTS, fields={"involvedObject.name": pod.name})
            pod = pod_of(manifest, sorted(events, key=lambda event: str(event.get("lastTimestamp") or "")))
        pods.append(pod)
    return sorted(pods, key=lambda pod: (pod.node, pod.created, pod.name))
