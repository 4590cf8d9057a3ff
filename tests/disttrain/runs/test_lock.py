"""One process at a time writes to a run directory, and a dead one does not keep it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disttrain.errors import ConfigurationError
from disttrain.runs import lock
from disttrain.runs.lock import owned, this_owner
from disttrain.testing import run_workers

OWNER = """
import os, sys, time
from pathlib import Path
from disttrain.runs.lock import owned

with owned(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "forks" else 1  # as a data worker is
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def owner(folder: Path, *, forks: bool = False) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that owns the folder, and the id of its child."""
    command = [sys.executable, "-c", OWNER, str(folder), "forks" if forks else "alone"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if forks:
            os.kill(child, signal.SIGKILL)


def test_a_second_writer_is_refused_and_told_who_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_TO_END_S", 0.1)
    said: list[str] = []
    with (
        owner(tmp_path) as (process, _),
        pytest.raises(ConfigurationError, match=rf"in use: process {process.pid} on .+ is training there"),
        owned(tmp_path, patience_s=0.5, say=said.append),
    ):
        pass
    (line,) = said
    assert re.search(rf"in use: process {process.pid} on .+ waiting for its end, \d s at most", line)


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "its child lives on"])
def test_a_dead_owner_gives_it_back(tmp_path: Path, forks: bool) -> None:
    with owner(tmp_path, forks=forks) as (process, _):
        process.kill()
        process.wait()
        with owned(tmp_path, patience_s=0.0):
            assert re.fullmatch(rf"process {os.getpid()} on .+\n", (tmp_path / ".lock").read_text())
    assert not list(tmp_path.iterdir())


def test_the_owner_is_named_at_once_over_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends what is written when the file is closed, or then."""
    sent: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: sent.append((tmp_path / ".lock").read_bytes()))
    with owned(tmp_path):
        assert sent == [this_owner().encode()]


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, _):
        begin = time.monotonic()
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
        with owned(tmp_path, patience_s=30.0):
            assert time.monotonic() - begin > 0.3


def increase(counter: Path, times: int) -> None:
    for _ in range(times):
        with owned(counter.parent, patience_s=60.0):
            number = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(number + 1))


def test_nobody_slips_in_while_it_changes_hands(tmp_path: Path) -> None:
    """The owner removes the file in the end; one who waits for the old file must not own it beside one with a new."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    run_workers(increase, 3, args=(counter, 15), process_group=False)
    assert counter.read_text() == "45"
