"""What a kubelet does: pods as processes, on hosts of their own if there are any.

There is no container file system: mounted folders are folders elsewhere, and the paths in a pod's command and variables
are translated.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from disttrain.testing.hosts import Cluster as Hosts
from disttrain.testing.hosts import Host
from tests.launch.kubernetes.fake_api import Object, Store, now

INDEX = "batch.kubernetes.io/job-completion-index"


class Kubelet:
    """Runs pods. `program` is what the image's `disttrain` is."""

    def __init__(self, store: Store, folder: Path, program: list[str], hosts: Hosts | None) -> None:
        self.store, self.folder = store, folder
        self.unschedulable: str | None = None  # why no pod finds a machine
        self.pull_error: str | None = None
        self.hurry = 1.0  # grace periods are over that much sooner
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.places: dict[str, Host] = {}
        self.closing = threading.Event()
        self._program, self._hosts = program, hosts

    def kill(self, pod: str, *, disruption: bool = False) -> None:
        """SIGKILL for everything in a pod; as a disruption, the cluster takes the blame."""
        with self.store.lock:
            if disruption:
                condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
                self.store.objects["pods", pod]["status"]["conditions"].append(condition)
        if pod not in self.places:
            os.killpg(self.processes[pod].pid, signal.SIGKILL)
            return
        while pids := self.places[pod].pids():  # workers have sessions of their own
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self, pod: str) -> None:
        """A pod that hangs: SIGTERM changes nothing."""
        self.processes[pod].send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End every pod."""
        self.closing.set()
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        while self.unschedulable is not None and not self.closing.is_set():
            condition = {"type": "PodScheduled", "status": "False", "message": self.unschedulable}
            self._set(pod, conditions=[condition])
            time.sleep(0.05)
        while self.pull_error is not None and not self.closing.is_set():
            self._set_state(pod, {"waiting": {"reason": "ErrImagePull", "message": self.pull_error}})
            time.sleep(0.05)
        with self.store.lock:
            if self.closing.is_set() or "deletionTimestamp" in pod["metadata"]:
                self._set(pod, phase="Failed")
                self.store.remove("pods", name)
                return
            self._set(pod, conditions=[{"type": "PodScheduled", "status": "True"}])
            process = self._start(pod)
            self.processes[name] = process
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
        variables = {"JOB_COMPLETION_INDEX": metadata["annotations"][INDEX]}
        for entry in container["env"]:
            variables[entry["name"]] = address if "valueFrom" in entry else entry["value"]
        folders = self._mounts(pod)
        variables = {key: _translated(value, folders) for key, value in variables.items()}
        words = [re.sub(r"\$(?:(\$)|\((\w+)\))", lambda m: m[1] or variables[m[2]], word) for word in container["args"]]
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
        self.places[pod["metadata"]["name"]] = host
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

    def terminate(self, pod: Object) -> None:
        if "deletionTimestamp" in pod["metadata"]:
            return
        name = pod["metadata"]["name"]
        pod["metadata"]["deletionTimestamp"] = now()
        process = self.processes.get(name)
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


def _translated(text: str, folders: dict[str, str]) -> str:
    mounted = "|".join(re.escape(path) for path in folders)
    return re.sub(rf"(?<![\w/])({mounted})(?=/|$)", lambda found: folders[found[1]], text)
