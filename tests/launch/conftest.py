"""Real launchers with real workers; the workers are small programs, because what they compute is not the question."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

_PREAMBLE = """
import atexit, json, os, signal, sys, time
from pathlib import Path
from disttrain.health.stop import end_with_launcher
end_with_launcher()
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def here(name):  # tells the test how far this worker is
    Path(f"{name}-{rank}").touch()
def wait_for(name):
    while not Path(name).exists():
        time.sleep(0.01)
def report(message, code, at=None, traceback=None):
    words = {"message": message, "exit_code": code, "rank": rank, "host": "box", "traceback": traceback}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(words | {"time": at or time.time()}))
    os._exit(code)
def finished():  # a worker that comes to the end of its code says so, one that leaves in the middle does not
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"exit_code": 0}))
atexit.register(finished)
"""
_LAUNCHER = """
import json, sys
from pathlib import Path
from disttrain.distributed import suspended
from disttrain_launch.local import watch, workers
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.restarts import Restarts
size, log_dir, grace_s, max_restarts, to_report_s = json.loads(sys.argv[1])
watch._TO_REPORT_S = to_report_s
suspended.LOOK_EVERY_S = watch.LOOK_EVERY_S = 0.5
group = WorkerGroup(("worker.py",), size, log_dir=Path(log_dir) if log_dir else None, grace_s=grace_s)
workers.run_workers(group, Restarts(max_restarts, Path("run")))
"""


@dataclass
class Launcher:
    """A running launcher in a folder and a TMPDIR of its own."""

    process: subprocess.Popen[str]
    folder: Path
    mark: str

    def wait_for(self, *names: str) -> None:
        """Wait until the workers have made these files."""
        deadline = time.monotonic() + 240
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"no {names} in {os.listdir(self.folder)}"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the launcher alone."""
        self.process.send_signal(number)

    def end(self, timeout_s: float = 240) -> tuple[int, str, str]:
        """Wait for it: exit code, standard output, standard error. Nothing may be left of it."""
        out, err = self.process.communicate(timeout=timeout_s)
        self.assert_nothing_left()
        return self.process.returncode, out, err

    def assert_nothing_left(self, within_s: float = 480) -> None:
        """No process and no temporary file."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []
        assert os.listdir(self.folder / "tmp") == []

    def processes(self) -> list[psutil.Process]:
        """What runs of it, other than the launcher."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAUNCHER_MARK") == self.mark and process.pid != self.process.pid:
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


StartLauncher = Callable[..., Launcher]


@pytest.fixture
def start_launcher(tmp_path: Path) -> Iterator[StartLauncher]:
    """Starts a launcher of workers that run the given code."""
    launchers: list[Launcher] = []

    def start(
        code: str,
        size: int,
        *,
        logs: bool = True,
        grace_s: float = 5.0,
        prefix: tuple[str, ...] = (),
        max_restarts: int = 0,
        to_report_s: float = 2.0,
    ) -> Launcher:
        (tmp_path / "worker.py").write_text(_PREAMBLE + dedent(code))
        (tmp_path / "tmp").mkdir()
        (tmp_path / "logs").mkdir()
        request = json.dumps([size, str(tmp_path / "logs") if logs else None, grace_s, max_restarts, to_report_s])
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _LAUNCHER, request],
            cwd=tmp_path,
            env=os.environ | {"LAUNCHER_MARK": mark, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        launchers.append(Launcher(process, tmp_path, mark))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.process.kill()
        launcher.process.communicate()
        for process in launcher.processes():
            process.kill()
