"""A worker's process: how it starts, how it ends, and how a failure is reported."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import select
import sys
import threading
import time
import traceback
from typing import NoReturn

import click

from disttrain.distributed.report import report_failure, report_finished
from disttrain.errors import AgreedError, DisttrainError, ExitCode, PeerError, failure_time, is_lost_peer
from disttrain.health.stop import end_with_launcher
from disttrain.terminal.output import have_standard_streams, keep_the_launchers_streams_from_forks


def worker(command: click.Command) -> int:
    """Run `command` on this process's arguments and return the exit code by which the launcher decides what to do.

    A failure goes to the file that the launcher named in TORCHELASTIC_ERROR_FILE, and to standard error unless the
    launcher is ours, which shows the first failing worker's. Only an unexpected one comes with a traceback. That the
    command reached its end is written there, too: a user's code may end the process with 0 in the middle.
    """
    from disttrain.recipe.home import home_folder  # not above: `--help` need not wait for pydantic

    have_standard_streams()
    keep_the_launchers_streams_from_forks()
    end_with_launcher()
    try:
        os.environ.setdefault("HOME", str(home_folder()))  # libraries keep caches there, and some fail without one
        # Not `main`, which turns every broken pipe, a socket's too, into a silent exit with 1.
        with command.make_context(command.name, sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
        report_finished()
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        return 130
    except DisttrainError as error:
        is_agreed = isinstance(error, AgreedError)
        is_peers = isinstance(error, PeerError)
        report_failure(
            str(error), error.exit_code, error.trace, failure_time(error), consequence=is_peers, is_agreed=is_agreed
        )
        return error.exit_code
    except SystemExit as leaving:
        place = traceback.extract_tb(leaving.__traceback__)[-1]
        message = f"{place.filename}:{place.lineno} called sys.exit({leaving.code!r}) before the work was done"
        report_failure(message, ExitCode.FAILURE, None, time.time())
        return ExitCode.FAILURE
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_has_no_reader():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be flushed at the end must not fail again
            return ExitCode.UNREAD
        message = f"{type(error).__name__}: {error}"
        trace: str | None = traceback.format_exc()
        peer_has_gone = is_lost_peer(error)
        if peer_has_gone:
            message = f"lost the connection to another worker, which has died or cannot be reached: {_brief(error)}"
            trace = None  # its log has it, and it does not show the cause
        report_failure(message, ExitCode.FAILURE, trace, failure_time(error), consequence=peer_has_gone)
        return ExitCode.FAILURE
    return ExitCode.DONE


def leave(code: int) -> NoReturn:
    """End this process with `code` as Python would, but without tearing every module down.

    Taking torch apart costs a second of processor time and frees what the system frees anyway. After a failure it would
    also say goodbye to ranks that still wait in the process group, which may take forever.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for each kind of thread that Python waits for
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # we only wrote it; where it goes is not ours
                stream.flush()
    os._exit(code)


def _brief(error: Exception) -> str:
    """The first line of gloo's message, without the place in its source."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^\[[^\]]*\]\s*", "", lines[0]) if lines else type(error).__name__


def _output_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(1, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
