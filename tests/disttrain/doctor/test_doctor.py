"""`disttrain doctor`: each thing that it looks for is really broken here, and it says so."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from torchvision.datasets import CIFAR10

from disttrain.commands import doctor as doctor_command
from disttrain.doctor import (
    Check,
    Finding,
    Question,
    checks_for,
    examine,
    files,
    machine,
    network,
    recipes,
    server,
    software,
    url,
)
from disttrain.testing import blackhole_port, disk, hosts, refusing_port, small_disk
from tests.disttrain.data.sources.cifar_files import write_cifar

needs_root = pytest.mark.skipif(disk.why_not() is not None, reason=str(disk.why_not()))
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("MLFLOW_TRACKING") or name.endswith("SOCKET_IFNAME"):
            monkeypatch.delenv(name)


def only(findings: Iterator[Finding]) -> Finding:
    """The one finding; every one that is not ok has a remedy."""
    (finding,) = findings
    assert bool(finding.remedy) == (finding.status != "ok"), finding
    return finding


def test_all_is_well_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "disttrain_launch", "doctor", "digits", "--json", "--timeout", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert set(answer) == {"checks"}
    assert all(set(check) == {"name", "status", "detail", "remedy"} for check in answer["checks"])
    status = {check["name"]: check["status"] for check in answer["checks"]}
    assert len(status) == len(answer["checks"])
    assert {name for name, found in status.items() if found == "ok"} >= {
        "python", "libraries", "gpus", "gloo", "ports", "run-directory", "locks", "file-clock", "recipe", "tracking",
        "data",
    }  # fmt: skip
    assert os.listdir(tmp_path) == []


def test_one_that_hangs_crashes_or_breaks_down_hides_no_other() -> None:
    def good() -> Iterator[Finding]:
        print("noise")
        yield Finding("good", "ok", "fine")

    def hangs() -> Iterator[Finding]:
        time.sleep(600)
        yield from ()

    def aborts() -> Iterator[Finding]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield from ()

    def breaks_down() -> Iterator[Finding]:
        yield Finding("never told", "ok", "")
        raise ValueError("not so")

    functions = {"first": good, "hangs": hangs, "aborts": aborts, "breaks": breaks_down, "last": good}
    checks = [Check(name, function, if_it_hangs="wake it") for name, function in functions.items()]
    assert [(found.name, found.status, found.detail) for found in examine(checks, 5)] == [
        ("good", "ok", "fine"),
        ("hangs", "failure", "no answer within 5 s (--timeout gives a busy machine more)"),
        ("aborts", "failure", "the check itself failed: killed by SIGKILL"),
        ("breaks", "failure", "the check itself failed: exit code 1: ValueError: not so"),
        ("good", "ok", "fine"),
    ]


def test_what_a_person_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> Iterator[Finding]:
        yield Finding("disk", "ok", "large")
        yield Finding("clock", "failure", "stands still", "wind it up")

    monkeypatch.setattr("disttrain.doctor.checks_for", lambda question: [Check("x", bad)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(doctor_command.command, [])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 78
    assert result.stdout.splitlines() == [
        "ok       disk           large",
        "failure  clock          stands still",
        "                        wind it up",
    ]


# Software


def test_a_library_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch-1.13.1.dist-info").mkdir()
    (tmp_path / "torch-1.13.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.13.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = only(software.libraries())
    assert (found.status, found.detail) == ("failure", "torch is 1.13.1 (needs >=2.11)")
    assert found.remedy == f"{sys.executable} -m pip install 'torch>=2.11'"


# The machine


def test_the_cores_that_a_quota_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for quota, told in ((2.5, ", by a CPU quota of 2.5"), (None, "")):
        monkeypatch.setattr(machine, "cpu_quota", lambda quota=quota: quota)
        found = only(machine.cores())
        assert (found.status, found.detail) == ("ok", f"2 of this machine's 64 are for workers{told}")


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: 200 * 1024**2)
    found = only(machine.memory())
    assert found.status == "warning"
    assert found.detail.endswith("200 MiB allowed")


@needs_root
def test_little_shared_memory(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", 64 * 1024**2):
        found = only(machine.shared_memory(tmp_path / "shm"))
    assert (found.status, found.detail) == ("warning", f"{tmp_path}/shm has 64 MiB, 64 MiB of it free")
    assert "--shm-size" in found.remedy


def test_few_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        found = only(machine.open_files())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.status, found.detail) == ("warning", "a process may open 256 files")


# The network


def in_a_namespace(shell: str, expression: str, *flags: str) -> list[list[str]]:
    """[status, detail] of each finding of the network check in namespaces of its own, after the shell commands."""
    code = f"import json; from disttrain.doctor import network as n; print(json.dumps([[f.status, f.detail] for f in {expression}]))"  # noqa: E501
    command = ["unshare", *flags, "sh", "-ec", f'{shell}; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


@needs_hosts
def test_a_host_name_that_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 box\n203.0.113.7 far\n")
    shell = f"mount --bind {tmp_path}/hosts /etc/hosts; hostname "
    own, other = (
        "box is 127.0.1.1, which no other machine can reach",
        "far is 203.0.113.7, and this machine has no such",
    )
    assert in_a_namespace(f"{shell} box", "[*n.host_name(False), *n.host_name(True)]", "-mu") == [
        ["warning", f"{own}; enough for this machine alone"],
        ["failure", own],
    ]
    (found,) = in_a_namespace(f"{shell} far", "n.host_name(True)", "-mu")
    assert found[0] == "failure"
    assert found[1].startswith(other)


@needs_hosts
def test_without_a_loopback_interface_there_are_no_ports() -> None:
    ((status, detail), (interface, where)) = in_a_namespace("true", "[*n.ports(), *n.interface(False)]", "-n")
    assert (status, detail.startswith("127.0.0.1: ")) == ("failure", True)
    assert (interface, where.endswith("is down")) == ("failure", True)


@needs_hosts
def test_several_machines_need_another_interface_than_loopback(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("10.9.9.9 box\n")
    shell = (
        f"mount --bind {tmp_path}/hosts /etc/hosts; hostname box; ip link set lo up; "
        "ip link add wire type veth peer name other; ip addr add 10.9.9.9/24 dev wire; "
        "ip link set wire up; ip link set other up"
    )
    assert in_a_namespace(shell, "[*n.host_name(True), *n.interface(True)]", "-mun") == [
        ["ok", "box is 10.9.9.9"],
        ["ok", "wire (10.9.9.9), as the host name says"],
    ]
    (found,) = in_a_namespace(f"{shell}; export GLOO_SOCKET_IFNAME=lo", "n.interface(True)", "-mun")
    assert found == ["failure", "lo, as GLOO_SOCKET_IFNAME says, which no other machine can reach"]


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    found = only(network.interface(False))
    assert (found.status, found.detail) == ("failure", "GLOO_SOCKET_IFNAME names eth77, and there is no such interface")


def test_rendezvous() -> None:
    with refusing_port() as port:
        assert only(network.rendezvous(f"127.0.0.1:{port}")).status == "ok"
    with blackhole_port() as port:
        found = only(network.rendezvous(f"127.0.0.1:{port}"))
    assert (found.status, found.detail) == ("failure", f"127.0.0.1:{port} cannot be reached: no answer")
    assert only(network.rendezvous("bad..name:29500")).status == "failure"


# Files


def test_a_run_directory_is_left_as_it_was(tmp_path: Path) -> None:
    findings = list(files.run_directory(tmp_path / "a/b"))
    assert [finding.name for finding in findings] == ["run-directory", "locks", "file-clock", "disk-space"]
    assert {finding.status for finding in findings if finding.name != "disk-space"} == {"ok"}
    assert os.listdir(tmp_path) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").touch()
    (tmp_path / "run/.doctor-old").mkdir()
    os.utime(tmp_path / "run/.doctor-old", (0, 0))
    list(files.run_directory(tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == ["recipe.toml"]


def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    for folder in ("runs", "runs/run"):
        found = only(files.run_directory(tmp_path / folder))
        assert (found.status, found.name) == ("failure", "run-directory")
    assert (tmp_path / "runs").read_text() == "mine"


@needs_root
def test_a_full_a_small_and_a_read_only_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 * 1024**2) as place:
        findings = {finding.name: finding for finding in files.run_directory(place.path)}
        assert findings["run-directory"].status == "ok"
        assert findings["disk-space"].status == "failure"
        place.fill()
        found = only(files.run_directory(place.path))
        assert (found.status, "No space left" in found.detail) == ("failure", True)
        place.free()
        place.read_only()
        found = only(files.run_directory(place.path))
        assert (found.status, "Read-only file system" in found.detail) == ("failure", True)
        place.writable()
        assert os.listdir(place.path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_was_made_is_removed_under_kill(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "from disttrain.doctor import Check, examine; from disttrain.doctor.files import _probe\n"
        "from disttrain.commands.doctor import _unwind\n"
        "def look():\n"
        "    with _probe(Path(sys.argv[1])):\n"
        "        time.sleep(600)\n"
        "    yield\n"
        "signal.signal(signal.SIGTERM, _unwind)\n"
        "list(examine([Check('x', look)], 600))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "runs")], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/.doctor-*")) != [])
        process.send_signal(number)
        process.wait(timeout=240)
        wait_until(lambda: os.listdir(tmp_path) == [])
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Any) -> None:
    """Wait for the condition, a minute at most."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_clock_that_differs(tmp_path: Path) -> None:
    assert files._clock(tmp_path, 4.0).status == "ok"
    assert "60 s behind" in files._clock(tmp_path, -60.0).detail


def test_runs_behind_a_url(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    found = only(url.run_url(f"file://{tmp_path}/bucket"))
    assert (found.status, os.listdir(tmp_path / "bucket")) == ("ok", [])
    assert only(url.run_url("memory://runs")).status == "ok"
    found = only(url.run_url(f"file://{tmp_path}/nowhere/at/all"))
    assert (found.status, "No such file" in found.detail) == ("failure", True)
    for address in ("nothing://runs", "http://[", "http://me:secret@host/runs"):
        found = only(url.run_url(address))
        assert (found.status, "secret" in found.detail) == ("failure", False)
    names = [check.name for check in checks_for(Question(run_dir="memory://runs"))]
    assert names.index("run-url") == names.index("run-directory") + 1


# The tracking server


class Answering(BaseHTTPRequestHandler):
    """Answers every request alike."""

    status, body, shift_s = 200, b"{}", 0.0
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(f"{self.path} {self.headers['Authorization']}")
        self.send_response_only(self.status)
        self.send_header("Date", self.date_time_string(time.time() + self.shift_s))
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def asked_of_a_server(monkeypatch: pytest.MonkeyPatch, userinfo: str = "", **answer: Any) -> list[Finding]:
    """What is found of a server with this answer."""
    handler = type("Handler", (Answering,), {**answer, "seen": Answering.seen})
    Answering.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{userinfo}127.0.0.1:{listening.server_port}")
        try:
            return list(server.tracking(Question()))
        finally:
            listening.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "grade", "words"),
    [
        (403, b'{"error_code": "PERMISSION_DENIED"}', "failure", "refuses: HTTP 403 PERMISSION_DENIED"),
        (401, b"go away", "failure", "refuses: HTTP 401"),
        (404, b"<html>", "failure", "refuses: HTTP 404"),
        (200, b"<html>a start page</html>", "failure", "refuses: HTTP 200"),
        (302, b"", "failure", "refuses: HTTP 302"),
        (503, b"later", "warning", "refuses: HTTP 503"),
        (200, b"{}", "failure", "refuses: HTTP 200"),
        (200, b'{"experiment": {"experiment_id": "1"}}', "ok", "lets the experiment 'disttrain' be written"),
    ],
)
def test_a_server_that_answers(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, grade: str, words: str
) -> None:
    found, clock = asked_of_a_server(monkeypatch, "me:top%2Fsecret@", status=status, body=body)
    assert (found.status, words in found.detail) == (grade, True), found
    assert (clock.name, clock.status) == ("server-clock", "ok")
    assert all(line.endswith("Basic bWU6dG9wL3NlY3JldA==") for line in Answering.seen)
    assert "secret" not in f"{found} {clock}"


def test_a_server_of_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = asked_of_a_server(monkeypatch, status=500, shift_s=-3600.0)[-1]
    assert clock.status == "warning"
    assert re.search(r" is (359\d|3600) s behind this machine's clock$", clock.detail)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_port() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        found = only(server.tracking(Question()))
    assert (found.status, found.detail) == (
        "warning", f"http://***@127.0.0.1:{port} cannot be reached: Connection refused"
    )  # fmt: skip
    with blackhole_port() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        found = only(server.tracking(Question()))
    assert (found.status, found.detail) == ("warning", f"http://127.0.0.1:{port} does not answer")


def test_databases_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(server.tracking(Question())).status == "ok"
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/broken.db")
    found = only(server.tracking(Question()))
    assert (found.status, "file is not a database" in found.detail) == ("warning", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert only(server.tracking(Question())).detail.startswith("MLflow is switched off")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert only(server.tracking(Question())).status == "failure"


# The recipe and its data


def test_a_wrong_recipe_is_one_of_the_findings() -> None:
    question = Question(recipe="digits", overrides=("optim.lrr=1", "data.flip=7"))
    found = only(recipes.recipe(question))
    assert (found.status, "optim.lrr: unknown key" in found.detail, "\n" in found.detail) == ("failure", True, False)
    assert only(recipes.data(question)).status == "warning"
    assert only(server.tracking(question)).status == "failure"


def test_data_of_ones_own_task_are_tried_as_that_task_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    example = Path(__file__).parents[3] / "examples/biology/nuclei.toml"
    found = only(recipes.data(Question(recipe=str(example))))
    sys.modules.pop("nuclei", None)
    assert (found.status, found.detail) == ("ok", "nuclei:load: 455 training and 114 test samples")


def test_data_that_are_missing_or_damaged(tmp_path: Path) -> None:
    def found(*overrides: str) -> Finding:
        return only(recipes.data(Question(recipe="cifar10-net", overrides=(f"data.root={tmp_path}/data", *overrides))))

    assert (found().status, found("data.download=false").status) == ("warning", "failure")
    write_cifar(tmp_path / "data", CIFAR10)
    assert found("data.verify=false").detail == "cifar10: 100 training and 20 test samples"
    assert "does not have the published md5 sum" in found().detail
    (tmp_path / "data/cifar-10-batches-py/data_batch_3").unlink()
    assert (found().status, "data_batch_3 is missing" in found().detail) == ("failure", True)
