"""The agent of `disttrain node` and its workers' processes; what they compute is not the question."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from disttrain.distributed.ports import reserved_port
from disttrain_launch.nodes.node import Node

WORKER = """
import os, time
from collections.abc import Callable
from pathlib import Path
from disttrain.health.stop import end_with_launcher
end_with_launcher()
Path("pid").with_suffix(".new").write_text(str(os.getpid()))
Path("pid.new").rename("pid")
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped worker ends when it is continued")
def test_a_stopped_worker_is_named_and_ends_with_its_agent(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    with reserved_port() as port:
        node = Node(
            arguments=("worker.py",),
            nodes=(1, 1),
            host="127.0.0.1",
            port=port,
            workers=1,
            run_dir=str(tmp_path / "run"),
            recipe="digits",
            overrides=(),
            serves=True,
            address="127.0.0.1",
            max_restarts=0,
            job_id="one",
            grace_s=60,
        )
        environment = os.environ | node.variables() | {"TMPDIR": str(tmp_path)}
        agent = subprocess.Popen(node.command(), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert agent.stderr is not None
        wait_for(lambda: (tmp_path / "pid").exists() or agent.poll() is not None)
        assert agent.poll() is None, agent.stderr.read()
        worker = psutil.Process(int((tmp_path / "pid").read_text()))
        worker.send_signal(signal.SIGSTOP)
        assert agent.stderr.readline() == (
            f"disttrain: rank 0 (process {worker.pid}) is stopped (SIGSTOP) and the job waits for it; "
            f"resume it with: kill -CONT {worker.pid}\n"
        )
        agent.kill()
        agent.wait()
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    finally:
        agent.kill()
        agent.wait()
        if (tmp_path / "pid").exists():
            with suppress(psutil.Error):
                psutil.Process(int((tmp_path / "pid").read_text())).kill()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
