"""A real MLflow server on the loopback interface, and a way to cut the line to it."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disttrain.distributed.ports import reserved_port
from disttrain.recipe import Recipe, parse_recipe

START_TIMEOUT_S = 120


class MlflowServer:
    """`mlflow server` in a process group of its own, which can be killed and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self.port = folder, port
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log_path = self._folder / "server.log"
        with open(log_path, "ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            assert self._process.poll() is None, log_path.read_text()
            time.sleep(0.1)
        raise TimeoutError(log_path.read_text())

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Line:
    """A TCP line to a server: forwards every byte while it is up; connections to it are refused while it is down."""

    def __init__(self, server: int, port: int) -> None:
        self._target, self.port = server, port
        self.uri = f"http://127.0.0.1:{self.port}"
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._cut = threading.Event()
        self._left = math.inf

    def connect(self, num_bytes: float = math.inf) -> None:
        """Open the line; it breaks after `num_bytes`."""
        self._cut.clear()
        self._left = num_bytes
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._forward, args=(self._listener,))
        self._thread.start()

    def cut(self) -> None:
        self._cut.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _forward(self, listener: socket.socket) -> None:
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            stack.enter_context(listener)
            selector.register(listener, selectors.EVENT_READ)
            while not self._cut.is_set():
                for key, _ in selector.select(timeout=0.05):
                    if key.fileobj is listener:
                        client, _ = listener.accept()
                        server = socket.create_connection(("127.0.0.1", self._target))
                        for end, other in ((client, server), (server, client)):
                            stack.callback(end.close)
                            selector.register(end, selectors.EVENT_READ, other)
                        continue
                    with contextlib.suppress(OSError):
                        data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                        self._left -= len(data)
                        if self._left < 0:
                            return
                        if data:
                            key.data.sendall(data)
                            continue
                    for end in (key.fileobj, key.data):
                        selector.unregister(end)
                        end.close()  # type: ignore[union-attr]
                    break  # what else was selected may be of the same pair


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server for all tests; a test that kills it starts it again."""
    with reserved_port() as port:  # other tests, which run beside these, open ports all the time
        mlflow_server = MlflowServer(tmp_path_factory.mktemp("server"), port)
        try:
            mlflow_server.start()
            yield mlflow_server
        finally:
            mlflow_server.kill()


@pytest.fixture
def line(server: MlflowServer) -> Iterator[Line]:
    """A line to the server, cut at first."""
    with reserved_port() as port:
        line = Line(server.port, port)
        yield line
        line.cut()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "digits-1"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No MLflow settings of the machine, and short waits also where MLflow runs in the test's own process."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def recipe() -> RecipeMaker:
    """A recipe with the given keys in its `tracking` section."""

    def make(**tracking: object) -> Recipe:
        return parse_recipe({"tracking": {"experiment": "tests", **tracking}})

    return make
