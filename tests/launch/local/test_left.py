"""A process that a run's code leaves behind keeps nobody waiting for the run's output, and is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.disttrain.parallel.exact_runs import SMALL

# A daemon: it holds what it inherits, in a session of its own.
NET = """
import os, time
from disttrain.models import build_model

def net(num_classes, sample_shape):
    if os.environ["RANK"] == "1" and not os.fork():
        os.setsid()
        with open("daemon", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
        os._exit(0)
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_daemon_forked_on_any_rank_does_not_hold_the_launchers_output(tmp_path: Path) -> None:
    """Each worker of a run that continues without a lost one has that output, to take rank 0's place."""
    (tmp_path / "forks.py").write_text(NET)
    options = [word for one in (*SMALL, "train.max_steps=1", "model.name=forks:net") for word in ("-o", one)]
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", "-n", "2", "--run-dir", "run", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    finally:
        pid = int((tmp_path / "daemon").read_text())
        os.kill(pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    assert f"disttrain: process {pid} (python" in done.stderr
    assert done.stderr.count(" is still running") == 1
