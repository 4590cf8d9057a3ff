"""Output that cannot be written ends no run, and a log that cannot be written does not flood the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from disttrain.health.stop import stop_requests
from disttrain.runs.log import LogFile
from disttrain.terminal.output import leave_the_launchers_streams
from disttrain.tracking import last_status
from tests.disttrain.parallel.exact_runs import SMALL

needs_a_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, so Linux")


@contextlib.contextmanager
def output(kind: str) -> Iterator[int]:
    """A descriptor that takes nothing."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


PRINTS = """
import sys
from disttrain.terminal.output import have_unbreakable_output
have_unbreakable_output()
for _ in range(3):
    print("x" * 70_000)
    print("x", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write(str(file.fileno()))
"""


@needs_a_full_disk
@pytest.mark.parametrize("kind", ["full", "unread"])
def test_what_is_printed_to_nobody_is_dropped(tmp_path: Path, kind: str) -> None:
    with output(kind) as nobody:
        done = subprocess.run([sys.executable, "-c", PRINTS, tmp_path / "file"], stdout=nobody, stderr=nobody)
    assert done.returncode == 0


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    command = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", command, sys.executable, PRINTS, tmp_path / "file"], check=True)
    assert int((tmp_path / "file").read_text()) > 2


@needs_a_full_disk
def test_a_log_on_a_full_disk_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile(FileIO("/dev/full", "ab"), Path("/dev/full"))
    logger = logging.getLogger("a full disk")
    logger.propagate = False
    logger.addHandler(handler)
    for number in range(5):
        logger.error("number %d", number)
    handler.close()
    assert (
        capsys.readouterr().err
        == "warning: /dev/full cannot be written: No space left on device. Training continues.\n"
    )


@needs_a_full_disk
def test_a_run_whose_output_goes_nowhere_goes_on(tmp_path: Path) -> None:
    """No standard input, a pipe that nobody reads, and a disk that is full."""
    options = [word for override in (*SMALL, "parallel.exact=false", "train.epochs=1") for word in ("-o", override)]
    arguments = [sys.executable, "-m", "disttrain_launch", "train", "digits", "-n", "1", "--run-dir", tmp_path / "run"]
    with output("unread") as stdout, output("full") as stderr:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *map(str, arguments), *options]
        done = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=240)
    assert done.returncode == 0
    assert last_status(tmp_path / "run" / "journal.jsonl") == "FINISHED"
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    assert "epoch 1/1: accuracy" in log
    assert log.count("standard output can no longer be written: Broken pipe. Training continues.") == 1


def test_a_terminal_that_closes_is_a_request_to_stop_unless_nohup_has_it_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_will_not_lead_keeps_no_stream_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    left = os.dup(writer), os.dup(writer)
    os.close(writer)
    monkeypatch.setenv("DISTTRAIN_CONSOLE", "{} {}".format(*left))
    monkeypatch.setenv("DISTTRAIN_LAUNCHER_PID", "1" if os.getppid() != 1 else "2")
    leave_the_launchers_streams()
    assert os.write(left[0], b"x") == 1, "they are those of another process"
    monkeypatch.setenv("DISTTRAIN_LAUNCHER_PID", str(os.getppid()))
    leave_the_launchers_streams()
    with os.fdopen(reader, "rb") as stream:
        assert stream.read() == b"x", "nobody holds the other end"
    assert "DISTTRAIN_CONSOLE" not in os.environ


FORKS = """
import os, signal
from disttrain.terminal.output import keep_the_launchers_streams_from_forks
keep_the_launchers_streams_from_forks()
if not os.fork():
    signal.pause()
"""


def test_what_a_worker_that_may_lead_forks_keeps_no_stream_of_the_launcher() -> None:
    reader, writer = os.pipe()
    environment = {
        **os.environ,
        "DISTTRAIN_CONSOLE": f"{writer} {writer}",
        "DISTTRAIN_LAUNCHER_PID": str(os.getpid()),
    }
    worker = subprocess.Popen([sys.executable, "-c", FORKS], env=environment, pass_fds=[writer], start_new_session=True)
    os.close(writer)
    try:
        assert worker.wait(120) == 0
        with os.fdopen(reader, "rb") as stream:
            assert select.select([stream], [], [], 120)[0], "its fork holds the other end"
            assert stream.read() == b""
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
