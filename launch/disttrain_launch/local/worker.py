"""One worker process, from its start to the record of its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from disttrain.distributed.ending import Report, left_early, says_finished
from disttrain.distributed.verdicts import Verdict
from disttrain.errors import ExitCode
from disttrain.layout import CONSOLE, ERROR_FILE, JOINS, VERDICTS
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.outcome import LocalEnding, content_of, parsed, written_to


class Member(ABC):
    """A worker of a group, wherever it runs.

    Args:
        rank: that it was started with.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.ending: LocalEnding | None = None
        self.was_killed = self.was_shot = False
        self.computed_wrong = False
        """Whether the others name it as one that computes wrong numbers."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The number of its process, if that is one of this machine."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether it has ended. The first time it has, `ending` is set."""

    @abstractmethod
    def hear(self, verdict: Verdict) -> None:
        """Send it a verdict."""

    @abstractmethod
    def terminate(self) -> None:
        """Ask it to end."""

    @abstractmethod
    def kill(self) -> None:
        """End it and its children, and wait until it has ended."""

    @abstractmethod
    def shoot(self) -> None:
        """Kill it, and let its death count as one that has no cause in the others."""

    @abstractmethod
    def close(self) -> None:
        """Let go of its files; it has ended."""

    @abstractmethod
    def _says(self, what: str) -> object:
        """What it reports under this name."""

    def is_ready(self) -> bool:
        """Whether it says that it can continue without another worker."""
        return self._says("ready") is True

    def can_lead(self) -> bool:
        """Whether it says that it can take the place of rank 0."""
        return self._says("leads") is True

    def waits_to_join(self) -> bool:
        """Whether it says that it can take its place among the others."""
        return self._says("joins") is True

    def is_through(self) -> bool:
        """Whether it has made all steps, as it says, or has ended as it should: no other can join it any more."""
        has_ended_well = self.ending is not None and not self.ending.calls_for_an_end
        return has_ended_well or self._says("through") is True or self._says("exit_code") == ExitCode.DONE

    def failed_in(self, generation: int) -> bool:
        """Whether it says that this generation's group did not form, or broke although no worker died."""
        return self._says("generation") == generation and self._says("failed") is True

    def hung_in(self, generation: int) -> list[int]:
        """The ranks of this generation that, as it says, hold up the others."""
        return self._named("hung", generation)

    def corrupt_in(self, generation: int) -> list[int]:
        """The ranks of this generation that, as it says, compute wrong numbers."""
        return self._named("corrupt", generation)

    def is_unlike(self, other: Member) -> str | None:
        """What it says that it computes with and `other` has another one of; None if there is nothing."""
        own, others = self._says("sources"), other._says("sources")
        if not isinstance(own, dict) or not isinstance(others, dict):
            return None
        return next((name for name in sorted(own.keys() & others.keys()) if own[name] != others[name]), None)

    def _named(self, why: str, generation: int) -> list[int]:
        named = self._says(why) if self._says("generation") == generation else None
        return named if isinstance(named, list) else []

    def lost_words(self) -> str:
        """Who was lost, and of what; it has ended."""
        assert self.ending is not None
        why = "computed wrong numbers" if self.computed_wrong else "held up the others"
        return f"rank {self.rank} {why}" if self.was_shot else self.ending.told().splitlines()[0]


class Worker(Member):
    """A worker of this machine. It has a session of its own, so that a terminal's Ctrl-C reaches the launcher alone."""

    def __init__(
        self, group: WorkerGroup, rank: int, port: int, lifeline: int, console: tuple[int, int], *, joins: bool = False
    ) -> None:
        """`console`: where rank 0 prints, and whoever takes its place."""
        super().__init__(rank)
        self._group, self._joins = group, joins
        self._asked_to_end = False
        # Files without a name vanish with their last user: they need not be removed, however this process dies.
        self._report = _memory_file()
        self._written, self._said = b"", dict[str, object]()
        self._output = self._open_output()
        report = self._report.fileno()
        verdicts, self._verdicts = os.pipe()
        os.set_blocking(self._verdicts, False)
        environment = group.environment(rank, port) | {ERROR_FILE: f"/dev/fd/{report}", VERDICTS: str(verdicts)}
        environment |= {JOINS: "1" if joins else "", CONSOLE: "{} {}".format(*console)}
        keep = (report, verdicts, *console, *group.descriptors)
        try:
            self._process = self._start(group.arguments, environment, lifeline, self._output, keep)
        except OSError:  # the run may go on without it
            os.close(self._verdicts)
            raise
        finally:
            os.close(verdicts)

    @staticmethod
    def _start(
        arguments: Sequence[str],
        environment: Mapping[str, str],
        standard_input: int,
        output: IO[bytes] | None,
        keep: Sequence[int],
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=standard_input,
            stdout=output,
            stderr=output,
            pass_fds=keep,
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
                log=self._log,
                last_words=self._last_words(),
            )
        return self.ending is not None

    def shoot(self) -> None:
        """Kill it, and let its death count as one that has no cause in the others."""
        self.was_shot = True
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    def said(self) -> dict[str, object]:
        """What it reports."""
        written = written_to(self._report)
        if written != self._written:  # it is looked at often, and holds a digest of each module
            self._written, content = written, parsed(written)
            if isinstance(content, dict):  # else it is just writing: what it said before holds
                self._said = content
        return self._said

    def _says(self, what: str) -> object:
        return self.said().get(what)

    def hear(self, verdict: Verdict) -> None:
        """Send it a verdict."""
        with suppress(OSError):  # it has ended meanwhile
            os.write(self._verdicts, verdict.line())

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
        """Let go of its files; it has ended."""
        if self._report.closed:
            return
        self._report.close()
        os.close(self._verdicts)
        if self._output is not None:
            self._output.close()

    @property
    def _log(self) -> Path | None:
        """The file with what it prints, if it has one."""
        return self._group.log(self.rank, joins=self._joins)

    def _open_output(self) -> IO[bytes] | None:
        if self.rank == 0 and not self._joins:
            return None  # the launcher's own
        path = self._log
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
