"""One worker process, from its start to the record of its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

from disttrain.distributed.ending import Report, left_early, says_finished
from disttrain.errors import ExitCode
from disttrain.layout import ERROR_FILE
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.outcome import LocalEnding, content_of


class Worker:
    """A running worker. It has a session of its own, so that a terminal's Ctrl-C reaches the launcher alone."""

    def __init__(self, group: WorkerGroup, rank: int, port: int, lifeline: int) -> None:
        self.ending: LocalEnding | None = None
        self.was_killed = False
        self._group, self.rank = group, rank
        self._asked_to_end = False
        # Files without a name vanish with their last user: they need not be removed, however this process dies.
        self._report = _memory_file()
        self._output = self._open_output()
        report = self._report.fileno()
        self._process = subprocess.Popen(
            [sys.executable, *group.arguments],
            env=group.environment(rank, port) | {ERROR_FILE: f"/dev/fd/{report}"},
            stdin=lifeline,
            stdout=self._output,
            stderr=self._output,
            pass_fds=(report,),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether it has ended. The first time it has, `ending` is set."""
        if self.ending is None and self._process.poll() is not None:
            code, content = self._process.returncode, content_of(self._report)
            report = Report.of(content)
            if code == ExitCode.DONE and not says_finished(content):
                code, report = ExitCode.FAILURE, left_early()
            self.was_killed = code < 0
            if self.was_killed:
                self._kill_group()  # the children it can no longer end itself
            self.ending = LocalEnding(
                rank=self.rank,
                code=code,
                time=time.time(),
                asked=self._asked_to_end,
                report=report,
                log=self._group.log(self.rank),
                last_words=self._last_words(),
            )
        return self.ending is not None

    def terminate(self) -> None:
        """Ask it to end."""
        if not self.has_ended():
            self._asked_to_end = True
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # one that has been stopped could not save

    def kill(self) -> None:
        """End it and its children, and wait until it has ended."""
        if not self.has_ended():
            self._asked_to_end = True
            self._kill_group()
            self._process.wait()
            self.has_ended()

    def close(self) -> None:
        """Let go of its files."""
        self._report.close()
        if self._output is not None:
            self._output.close()

    def _open_output(self) -> IO[bytes] | None:
        if self.rank == 0:
            return None  # the launcher's own
        path = self._group.log(self.rank)
        if path is None:
            return TemporaryFile()
        from disttrain.recipe import ConfigurationError, open_to_append

        try:
            return open_to_append(path)
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror or error}; a worker cannot log there") from None

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # the latter is macOS's answer for zombies
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        """The end of what it wrote, where no log keeps it."""
        if self._output is None or self._group.log_dir is not None:
            return ""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 2000))
        return self._output.read().decode(errors="replace").strip()


def _memory_file() -> IO[bytes]:
    """A file that no full disk keeps from being written to, where the system has such files."""
    try:
        return os.fdopen(os.memfd_create("disttrain-report"), "w+b")
    except (AttributeError, OSError):  # another system, or a sandbox that forbids it
        return TemporaryFile()
