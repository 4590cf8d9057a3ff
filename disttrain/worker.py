"""A worker's process: how it starts, how it ends, and how a failure is reported."""

from __future__ import annotations

import io
import json
import os
import select
import socket
import sys
import traceback
from pathlib import Path

import click

from disttrain.errors import DisttrainError, ExitCode, failure_time
from disttrain.guard import end_with_launcher
from disttrain.world import launched_by, rank_hint

_LAUNCHER = "disttrain"


def worker(command: click.Command) -> int:
    """Run `command` on this process's arguments and return the exit code that tells the launcher what to do.

    A failure goes to the file that the launcher named in TORCHELASTIC_ERROR_FILE, and to standard error unless the
    launcher is ours, which shows the first failing worker's. Only an unexpected one comes with a traceback.
    """
    if launched_by() == _LAUNCHER:
        end_with_launcher()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a folder's name need not be UTF-8, and comes out as it is
    try:
        # Not `main`, which makes every broken pipe, a socket's too, an exit with 1 and without a word.
        with command.make_context(command.name, sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        return 130
    except DisttrainError as error:
        _report(str(error), error.exit_code, None, failure_time(error))
        return error.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_the_output():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be flushed at the end must not fail again
            return ExitCode.UNREAD
        _report(f"{type(error).__name__}: {error}", ExitCode.FAILURE, traceback.format_exc(), failure_time(error))
        return ExitCode.FAILURE
    return ExitCode.DONE


def _nobody_reads_the_output() -> bool:
    poll = select.poll()
    poll.register(1, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _report(message: str, exit_code: int, trace: str | None, failed_at: float) -> None:
    rank, host = rank_hint(), socket.gethostname()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        failure = {
            "message": message,
            "exit_code": int(exit_code),
            "rank": rank,
            "host": host,
            "traceback": trace,
            "time": failed_at,
            "timestamp": int(failed_at),  # torchrun's name for it, in whole seconds
        }
        # In place: it is read when this process is gone, and our launcher's file has no name to rename to.
        Path(error_file).write_text(json.dumps(failure), encoding="utf-8")
    told_by_all = exit_code in (ExitCode.STOPPED, ExitCode.DIVERGED)
    if launched_by() != _LAUNCHER and (not rank or not told_by_all):
        who = "" if rank is None else f"rank {rank} on {host}: "
        print(f"{trace or ''}disttrain: {who}{message}", file=sys.stderr, flush=True)
