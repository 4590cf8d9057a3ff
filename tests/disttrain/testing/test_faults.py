"""Every fault of the vocabulary, seen to happen: to workers, to launchers, to disks, ports and connections."""

from __future__ import annotations

import errno
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from disttrain.faultpoints import reached
from disttrain.testing import (
    HarnessError,
    Proxy,
    blackhole_port,
    disk,
    faults,
    proxy,
    refusing_port,
    run_workers,
    small_disk,
    workers,
)

needs_disk = pytest.mark.skipif(disk.why_not() is not None, reason=str(disk.why_not()))


def step_five_times() -> list[int]:
    done = []
    for step in range(5):
        reached("step", step=step)
        done.append(step)
    return done


def test_an_unarmed_point_costs_next_to_nothing() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        for step in range(1000):
            reached("step", step=step)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(10)) / 1000 < 5e-6  # the quickest: others use the machine, too


@pytest.mark.parametrize(
    ("fault", "ends"),
    [
        (faults.kill(1, step=2), "was killed by SIGKILL"),
        (faults.terminate(1, step=2), "was killed by SIGTERM"),
        (faults.stop(1, step=2), "is stopped by a signal (SIGSTOP)"),
        (faults.leave(1, 5, step=2), "exited with code 5 before it was done, without an exception"),
    ],
)
def test_a_rank_is_ended_or_stopped_at_a_step(fault: faults.Fault, ends: str) -> None:
    with workers(2, faults=[fault], timeout_s=2) as group:
        outcomes = group.attempt(step_five_times)
    assert outcomes[0].value == [0, 1, 2, 3, 4]
    assert outcomes[1].text == ends
    (entry,) = fault.happened
    assert (entry["point"], entry["rank"], entry["step"]) == ("step", "1", 2)


def test_a_rank_is_killed_at_a_moment() -> None:
    fault = faults.kill(0, after_s=0.3)
    with workers(2, faults=[fault]) as group:
        outcomes = group.attempt(lambda: time.sleep(600 if os.environ["RANK"] == "0" else 0))
    assert [outcome.state for outcome in outcomes] == ["died", "returned"]
    assert fault.happened[0]["point"] == "moment"


def test_a_rank_is_slowed_each_time() -> None:
    def body() -> float:
        start = time.monotonic()
        step_five_times()
        return time.monotonic() - start

    fault = faults.slow(1, 0.05)
    _, slow = run_workers(body, 2, faults=[fault])
    assert slow >= 0.25
    assert [entry["rank"] for entry in fault.happened] == ["1"] * 5


def test_a_point_fails_the_nth_time() -> None:
    def body() -> list[str]:
        seen = []
        for _ in range(3):
            try:
                reached("write")
                seen.append("written")
            except OSError as error:
                seen.append(errno.errorcode[error.errno or 0])
        return seen

    fault = faults.fail(0, errno.ENOSPC, at="write", count=2)
    assert run_workers(body, 2, faults=[fault]) == [["written", "ENOSPC", "written"], ["written"] * 3]


def test_a_file_is_torn(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"

    def body() -> int:
        if dist.get_rank() == 0:
            file.write_bytes(b"x" * 100)
            reached("written")
        dist.barrier()
        return file.stat().st_size

    assert run_workers(body, 2, faults=[faults.tear(file, at="written", keep=0.25)]) == [25, 25]


def test_writes_under_a_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    forbidden = tmp_path / "run"
    forbidden.mkdir()

    def body() -> list[str]:
        seen = []
        for action in (
            lambda: (forbidden / "new").write_text("x"),
            lambda: (forbidden / "folder").mkdir(),
            lambda: (tmp_path / "old").rename(forbidden / "old"),
            lambda: (tmp_path / "elsewhere").write_text("fine"),
            lambda: list(forbidden.iterdir()),
        ):
            try:
                action()
                seen.append("done")
            except OSError as error:
                seen.append(errno.errorcode[error.errno or 0])
        return seen

    fault = faults.refuse_writes(forbidden, errno.EIO)
    assert run_workers(body, 1, faults=[fault]) == [["EIO", "EIO", "EIO", "done", "done"]]
    assert fault.happened


LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
WORKER = """
import time
from disttrain.faultpoints import reached
for step in range(100):
    reached("step", step=step)
    print(step, flush=True)
    time.sleep(0.02)
"""


def test_processes_of_ones_own_are_armed_by_the_environment() -> None:
    fault = faults.kill(3, step=4)
    with faults.armed(fault) as env:
        done = subprocess.run(
            [sys.executable, "-c", WORKER],
            env=os.environ | env | {"RANK": "3"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1", "2", "3"]
    assert fault.happened[0]["step"] == 4


def test_the_launcher_is_killed_by_its_workers_step() -> None:
    fault = faults.kill("launcher", step=1)
    with faults.armed(fault) as env:
        command = [sys.executable, "-c", LAUNCHER, WORKER]
        with subprocess.Popen(command, env=os.environ | env | {"RANK": "0"}, stdout=subprocess.DEVNULL) as launcher:
            assert launcher.wait(60) == -signal.SIGKILL
            worker = fault.happened[0]["pid"]
            os.kill(worker, signal.SIGKILL)  # it has lost its launcher; nobody told it to go


def test_a_fault_happens_once_across_restarts() -> None:
    fault = faults.leave(0, 9, step=0)
    with faults.armed(fault) as env:
        codes = [
            subprocess.run(
                [sys.executable, "-c", "from disttrain.faultpoints import reached; reached('step', step=0)"],
                env=os.environ | env | {"RANK": "0"},
                timeout=240,
                check=False,
            ).returncode
            for _ in range(2)
        ]
    assert codes == [9, 0]


def test_when_has_to_be_said() -> None:
    with pytest.raises(ValueError, match="say when"):
        faults.kill(0)
    with pytest.raises(ValueError, match="and not both"):
        faults.kill(0, step=1, after_s=1.0)


@needs_disk
def test_a_small_disk_is_really_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as small:
        (small.path / "before").write_bytes(b"x" * 1000)
        small.fill()
        with pytest.raises(OSError, match="No space left") as caught:
            (small.path / "after").write_bytes(b"x" * 8192)
        assert caught.value.errno == errno.ENOSPC
        small.free()
        (small.path / "after").write_bytes(b"x" * 8192)
        small.fill(leave=8192)
        (small.path / "small").write_bytes(b"x" * 4096)
        assert (small.path / "before").read_bytes() == b"x" * 1000
    assert list((tmp_path / "disk").iterdir()) == []


@needs_disk
def test_a_small_disk_is_really_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as small:
        small.read_only()
        with pytest.raises(OSError, match="Read-only") as caught:
            (small.path / "file").write_text("x")
        assert caught.value.errno == errno.EROFS
        small.writable()
        (small.path / "file").write_text("x")


def test_without_root_a_small_disk_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HarnessError, match="needs root"), small_disk(tmp_path, 1 << 20):
        pass


def test_ports_that_do_not_answer() -> None:
    with refusing_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with blackhole_port() as port:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", port), timeout=0.3)
        assert time.monotonic() - start >= 0.3


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def before_a_server() -> Iterator[Proxy]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with proxy(f"http://127.0.0.1:{server.server_address[1]}") as made:
            yield made
        server.shutdown()


def post(port: int, body: bytes, timeout_s: float = 5.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_proxy_forwards_delays_and_answers_by_itself(before_a_server: Proxy) -> None:
    port = before_a_server.port
    big = bytes(range(256)) * 4096
    assert post(port, b"abc") == (200, b"cba")
    assert post(port, big) == (200, big[::-1])
    before_a_server.delay(0.15)
    start = time.monotonic()
    assert post(port, b"abc") == (200, b"cba")
    assert time.monotonic() - start >= 0.3
    before_a_server.answer(500)
    assert post(port, big)[0] == 500
    assert post(port, b"")[0] == 500
    assert before_a_server.errors_answered == 2
    before_a_server.forward()
    assert post(port, b"abc") == (200, b"cba")


def ask_again(connection: http.client.HTTPConnection) -> None:
    connection.request("POST", "/", b"abc")
    connection.getresponse()


def test_the_proxy_swallows_refuses_and_cuts(before_a_server: Proxy) -> None:
    port = before_a_server.port
    before_a_server.swallow()
    with pytest.raises(TimeoutError):
        post(port, b"abc", timeout_s=0.3)
    before_a_server.refuse()
    with pytest.raises(ConnectionRefusedError):
        post(port, b"abc")
    before_a_server.forward()
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    kept.request("POST", "/", b"abc")
    assert kept.getresponse().read() == b"cba"
    before_a_server.cut()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask_again(kept)
    kept.close()
    assert post(port, b"abc") == (200, b"cba")


def test_proxy_targets_are_checked() -> None:
    with pytest.raises(ValueError, match="a proxy needs a target such as"), proxy("//"):
        pass


@pytest.mark.parametrize(
    ("target", "kind"), [("1", TypeError), ("the launcher", TypeError), (True, TypeError), (-1, ValueError)]
)
def test_a_rank_that_cannot_be_is_refused(target: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="a fault hits a rank"):
        faults.kill(target, step=1)


def test_a_fault_at_a_rank_that_does_not_exist_is_refused() -> None:
    for wrong in (faults.kill(2, step=1), faults.slow(5, 0.1)):
        with pytest.raises(ValueError, match=r"would never happen: world_size is 2, so the last rank is 1"):
            run_workers(step_five_times, 2, faults=[wrong], process_group=False)
    launchers, everybodys = faults.kill("launcher", step=99), faults.slow(None, 0.1, step=99)
    assert run_workers(step_five_times, 1, faults=[launchers, everybodys], process_group=False) == [[0, 1, 2, 3, 4]]
