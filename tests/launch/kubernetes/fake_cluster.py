"""A cluster on this machine: the API server, the Job controller, and a kubelet whose pods are real processes.

With simulated hosts each pod has a network namespace, an address and, through the headless Service, a name of its own.
What it is made of: `fake_api`, `fake_kubelet`, and the controllers here.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from disttrain.testing.hosts import Cluster as Hosts
from tests.launch.kubernetes.fake_api import Object, Store, now, serve
from tests.launch.kubernetes.fake_kubelet import INDEX, Kubelet


class FakeCluster:
    """See the module; `kubelet` injures pods."""

    def __init__(self, folder: Path, program: list[str], hosts: Hosts | None = None) -> None:
        self.store = Store()
        self.folder = folder
        self.kubelet = Kubelet(self.store, folder, program, hosts)
        self._numbers = itertools.count()
        self._failures: Counter[tuple[str, int]] = Counter()
        self._counted: set[str] = set()
        self._server = serve(self.store, self.delete)
        self._controller = threading.Thread(target=self._control, daemon=True)
        self._controller.start()

    @property
    def kubeconfig(self) -> Path:
        """A file that names this cluster."""
        path = self.folder / "kubeconfig.yaml"
        path.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: fake\n"
            f"clusters: [{{name: fake, cluster: {{server: 'http://127.0.0.1:{self._server.server_port}'}}}}]\n"
            "users: [{name: me, user: {token: secret}}]\n"
            "contexts: [{name: fake, context: {cluster: fake, user: me, namespace: default}}]\n"
        )
        return path

    def close(self) -> None:
        """End every pod and the server."""
        self.kubelet.closing.set()
        self._controller.join(10)
        self.kubelet.close()
        self._server.shutdown()
        self._server.server_close()

    def pods(self) -> list[Object]:
        """The pods there are."""
        return sorted(self.store.of("pods"), key=lambda pod: str(pod["metadata"]["name"]))

    def wait(self, what: str, until: Any, timeout_s: float = 480) -> None:
        """Wait until `until()` is true."""
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"no {what}: {self.pods()}\n{self.store.logs}"
            time.sleep(0.02)

    # What controllers do

    def delete(self, plural: str, name: str, propagation: str | None) -> None:
        """Delete an object; without a propagation policy a Job's pods stay as orphans, as a real server has it."""
        with self.store.lock:
            found = self.store.get(plural, name)
            if found is None:
                return
            if plural == "pods":
                self.kubelet.terminate(found)
                return
            self.store.remove(plural, name)
            owned = [
                (kind, item["metadata"]["name"])
                for (kind, _), item in self.store.objects.items()
                if any(
                    owner["uid"] == found["metadata"]["uid"] for owner in item["metadata"].get("ownerReferences", [])
                )
            ]
            for kind, owned_name in owned if propagation in ("Foreground", "Background") else []:
                self.delete(kind, owned_name, propagation)

    def _control(self) -> None:
        while not self.kubelet.closing.is_set():
            with self.store.lock:
                for job in self.store.of("jobs"):
                    self._reconcile(job)
            with self.store.changed:
                self.store.changed.wait(0.05)

    def _reconcile(self, job: Object) -> None:
        spec, name = job["spec"], job["metadata"]["name"]
        before = copy.deepcopy(job.get("status", {}))
        status = job.setdefault("status", {"conditions": [], "failedIndexes": []})
        if any(c["type"] in ("Complete", "Failed") for c in status["conditions"]):
            return
        uid = job["metadata"]["uid"]
        mine = [p for p in self.store.of("pods") if p["metadata"]["ownerReferences"][0]["uid"] == uid]
        for pod in mine:
            self._account(job, pod, status)
        live = [pod for pod in mine if pod["status"]["phase"] in ("Pending", "Running")]
        succeeded = {_index(pod) for pod in mine if pod["status"]["phase"] == "Succeeded"}
        if len(status["failedIndexes"]) > spec["maxFailedIndexes"]:
            message = f"Job has exceeded the specified maximal number of failed indexes, {status['failedIndexes']}"
            status["conditions"].append({"type": "Failed", "status": "True", "message": message})
            for pod in live:
                self.kubelet.terminate(pod)
        elif spec["suspend"]:
            for pod in live:
                self.kubelet.terminate(pod)
        elif len(succeeded) == spec["completions"]:
            status["conditions"].append({"type": "Complete", "status": "True"})
        else:
            # podReplacementPolicy Failed: the old pod must have ended.
            for index in set(range(spec["completions"])) - succeeded - {_index(pod) for pod in live}:
                self._create(job, index)
        if status != before:
            self.store.put("jobs", self.store.objects["jobs", name])

    def _account(self, job: Object, pod: Object, status: Object) -> None:
        name = pod["metadata"]["name"]
        if pod["status"]["phase"] != "Failed" or name in self._counted:
            return
        self._counted.add(name)
        if "deletionTimestamp" in pod["metadata"]:  # by the controller itself
            return
        action = _action(job["spec"]["podFailurePolicy"]["rules"], pod)
        key = (job["metadata"]["uid"], _index(pod))
        if action != "Ignore":
            self._failures[key] += 1
        if action == "FailIndex" or self._failures[key] > job["spec"]["backoffLimitPerIndex"]:
            status["failedIndexes"].append(_index(pod))

    def failures(self) -> int:
        """How many pods counted as failed."""
        return sum(self._failures.values())

    def _create(self, job: Object, index: int) -> None:
        name = f"{job['metadata']['name']}-{index}-{next(self._numbers):05}"
        template = copy.deepcopy(job["spec"]["template"])
        owner = {
            "uid": job["metadata"]["uid"], "controller": True,
            "apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"],
        }  # fmt: skip
        metadata = {
            "name": name,
            "labels": template["metadata"]["labels"] | {INDEX: str(index)},
            "annotations": {INDEX: str(index)},
            "creationTimestamp": now(),
            "ownerReferences": [owner],
        }
        status = {"phase": "Pending", "conditions": [], "containerStatuses": []}
        pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": template["spec"], "status": status}
        pod["spec"]["hostname"] = f"{job['metadata']['name']}-{index}"
        self.store.put("pods", pod)
        threading.Thread(target=self.kubelet.run, args=(pod,), daemon=True).start()


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][INDEX])


def _action(rules: list[Object], pod: Object) -> str:
    code = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
    conditions = {(c["type"], c["status"]) for c in pod["status"]["conditions"]}
    for rule in rules:
        if any((c["type"], c["status"]) in conditions for c in rule.get("onPodConditions", [])):
            return str(rule["action"])
        if code in rule.get("onExitCodes", {}).get("values", []):
            return str(rule["action"])
    return "Count"


@contextmanager
def fake_cluster(folder: Path, program: list[str] | None = None, hosts: Hosts | None = None) -> Iterator[FakeCluster]:
    """A cluster for the block; afterwards no process of its pods is left."""
    made = FakeCluster(folder, program or [sys.executable, "-m", "disttrain_launch"], hosts)
    try:
        yield made
    finally:
        made.close()
