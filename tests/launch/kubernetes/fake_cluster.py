"""A cluster on this machine: the API server, the Job controller, and a kubelet whose pods are real processes.

With simulated hosts each pod has a network namespace, an address and, through the headless Service, a name of its own.
There is no container file system: mounted folders are folders elsewhere, and the paths in a pod's command and variables
are translated.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from disttrain.testing.hosts import Cluster as Hosts
from disttrain.testing.hosts import Host
from tests.launch.kubernetes.fake_api import Object, Store, now, serve

_INDEX = "batch.kubernetes.io/job-completion-index"


class FakeCluster:
    """See the module. `program` is what the image's `disttrain` is."""

    def __init__(self, folder: Path, program: list[str], hosts: Hosts | None = None) -> None:
        self.store = Store()
        self.folder = folder
        self.unschedulable: str | None = None  # why no pod finds a machine
        self.pull_error: str | None = None
        self.hurry = 1.0  # grace periods are over that much sooner
        self._program, self._hosts = program, hosts
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._places: dict[str, Host] = {}
        self._numbers = itertools.count()
        self._failures: Counter[tuple[str, int]] = Counter()
        self._counted: set[str] = set()
        self._closing = threading.Event()
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
        self._closing.set()
        self._controller.join(10)
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._server.shutdown()
        self._server.server_close()

    def pods(self) -> list[Object]:
        """The pods there are."""
        return sorted(self.store.of("pods"), key=lambda pod: str(pod["metadata"]["name"]))

    def kill(self, pod: str, *, disruption: bool = False) -> None:
        """SIGKILL for everything in a pod; as a disruption, the cluster takes the blame."""
        with self.store.lock:
            if disruption:
                condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
                self.store.objects["pods", pod]["status"]["conditions"].append(condition)
        if pod not in self._places:
            os.killpg(self._processes[pod].pid, signal.SIGKILL)
            return
        while pids := self._places[pod].pids():  # workers have sessions of their own
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self, pod: str) -> None:
        """A pod that hangs: SIGTERM changes nothing."""
        self._processes[pod].send_signal(signal.SIGSTOP)

    def wait(self, what: str, until: Any, timeout_s: float = 120) -> None:
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
                self._terminate(found)
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
        while not self._closing.is_set():
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
                self._terminate(pod)
        elif spec["suspend"]:
            for pod in live:
                self._terminate(pod)
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
            "labels": template["metadata"]["labels"] | {_INDEX: str(index)},
            "annotations": {_INDEX: str(index)},
            "creationTimestamp": now(),
            "ownerReferences": [owner],
        }
        status = {"phase": "Pending", "conditions": [], "containerStatuses": []}
        pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": template["spec"], "status": status}
        pod["spec"]["hostname"] = f"{job['metadata']['name']}-{index}"
        self.store.put("pods", pod)
        threading.Thread(target=self._run, args=(pod,), daemon=True).start()

    # What a kubelet does

    def _run(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        while self.unschedulable is not None and not self._closing.is_set():
            condition = {"type": "PodScheduled", "status": "False", "message": self.unschedulable}
            self._set(pod, conditions=[condition])
            time.sleep(0.05)
        while self.pull_error is not None and not self._closing.is_set():
            self._set_state(pod, {"waiting": {"reason": "ErrImagePull", "message": self.pull_error}})
            time.sleep(0.05)
        with self.store.lock:
            if self._closing.is_set() or "deletionTimestamp" in pod["metadata"]:
                self._set(pod, phase="Failed")
                self.store.remove("pods", name)
                return
            self._set(pod, conditions=[{"type": "PodScheduled", "status": "True"}])
            process = self._start(pod)
            self._processes[name] = process
            self.store.logs[name] = []
            self._set(pod, phase="Running")
            self._set_state(pod, {"running": {"startedAt": now()}})
        assert process.stdout is not None
        for line in process.stdout:
            with self.store.changed:
                self.store.logs[name].append(f"{now()} {line.rstrip(chr(10))}")
                self.store.changed.notify_all()
        code = process.wait()
        code = code if code >= 0 else 128 - code
        with self.store.lock:
            pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
            self._set_state(pod, {"terminated": {"exitCode": code}})
            if "deletionTimestamp" in pod["metadata"]:
                self.store.remove("pods", name)

    def _start(self, pod: Object) -> subprocess.Popen[str]:
        container, metadata = pod["spec"]["containers"][0], pod["metadata"]
        host = self._place(pod)
        address = host.address if host else "127.0.0.1"
        variables = {"JOB_COMPLETION_INDEX": metadata["annotations"][_INDEX]}
        for entry in container["env"]:
            variables[entry["name"]] = address if "valueFrom" in entry else entry["value"]
        folders = self._mounts(pod)
        variables = {key: _translated(value, folders) for key, value in variables.items()}
        words = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], word) for word in container["args"]]
        assert container["command"] == ["disttrain"]
        command = [*self._program, *(_translated(word, folders) for word in words)]
        options: dict[str, Any] = {
            "env": {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"} | variables,
            "cwd": _translated(container["workingDir"], folders),
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "start_new_session": True,
        }
        return host.start(command, **options) if host else subprocess.Popen(command, **options)

    def _mounts(self, pod: Object) -> dict[str, str]:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        folders = {}
        for mount in pod["spec"]["containers"][0]["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                folder = self.folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
            elif "configMap" in volume:
                folder = self.folder / pod["metadata"]["name"] / mount["name"]
                folder.mkdir(parents=True)
                for key, text in self.store.objects["configmaps", volume["configMap"]["name"]]["data"].items():
                    (folder / key).write_text(text)
            else:
                folder = self.folder / pod["metadata"]["name"] / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            folders[mount["mountPath"]] = str(folder)
        return folders

    def _place(self, pod: Object) -> Host | None:
        if self._hosts is None:
            return None
        host = self._hosts.add()
        self._places[pod["metadata"]["name"]] = host
        pod["status"]["podIP"] = host.address
        lines = ["127.0.0.1 localhost"]
        for other in self.store.of("pods"):  # the newest last: earlier ones of that name have ended
            service = self.store.get("services", other["spec"].get("subdomain", ""))
            selector = service["spec"]["selector"] if service else {}
            if "podIP" in other["status"] and selector and selector.items() <= other["metadata"]["labels"].items():
                if other["status"]["phase"] in ("Succeeded", "Failed"):
                    continue
                hostname = other["spec"]["hostname"]
                lines.append(f"{other['status']['podIP']} {hostname}.{other['spec']['subdomain']} {hostname}")
        Path(host.directory, "hosts").write_text("\n".join(lines) + "\n")
        return host

    def _terminate(self, pod: Object) -> None:
        if "deletionTimestamp" in pod["metadata"]:
            return
        name = pod["metadata"]["name"]
        pod["metadata"]["deletionTimestamp"] = now()
        process = self._processes.get(name)
        if pod["status"]["phase"] in ("Succeeded", "Failed"):
            self.store.remove("pods", name)
            return
        self.store.put("pods", pod)
        if process is not None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            grace_s = pod["spec"]["terminationGracePeriodSeconds"] / self.hurry
            timer = threading.Timer(grace_s, lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
            timer.daemon = True
            timer.start()

    def _set(self, pod: Object, **fields: Any) -> None:
        with self.store.lock:
            pod["status"] |= fields
            if self.store.get("pods", pod["metadata"]["name"]) is not None:
                self.store.put("pods", pod)

    def _set_state(self, pod: Object, state: Object) -> None:
        self._set(pod, containerStatuses=[{"name": "node", "state": state}])


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][_INDEX])


def _action(rules: list[Object], pod: Object) -> str:
    code = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
    conditions = {(c["type"], c["status"]) for c in pod["status"]["conditions"]}
    for rule in rules:
        if any((c["type"], c["status"]) in conditions for c in rule.get("onPodConditions", [])):
            return str(rule["action"])
        if code in rule.get("onExitCodes", {}).get("values", []):
            return str(rule["action"])
    return "Count"


def _translated(text: str, folders: dict[str, str]) -> str:
    mounted = "|".join(re.escape(path) for path in folders)
    return re.sub(rf"(?<![\w/])({mounted})(?=/|$)", lambda found: folders[found[1]], text)


@contextmanager
def fake_cluster(folder: Path, program: list[str] | None = None, hosts: Hosts | None = None) -> Iterator[FakeCluster]:
    """A cluster for the block; afterwards no process of its pods is left."""
    made = FakeCluster(folder, program or [sys.executable, "-m", "disttrain_launch"], hosts)
    try:
        yield made
    finally:
        made.close()
