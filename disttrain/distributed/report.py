"""How a failure, or a worker's having finished, reaches the launcher and the user."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from disttrain.distributed import ending
from disttrain.distributed.launched import OUR_LAUNCHERS, launched_by, rank_hint
from disttrain.errors import ExitCode, printable
from disttrain.files import parse_json
from disttrain.layout import ERROR_FILE


def report_failure(
    message: str,
    exit_code: int,
    trace: str | None,
    failed_at: float,
    *,
    consequence: bool = False,
    is_agreed: bool = False,
) -> None:
    """Write the failure to the file that the launcher named in `layout.ERROR_FILE`, if it named one.

    Without our launcher, print it on standard error too. `failed_at` is in seconds since 1970; a `consequence` is
    mostly another rank's failure, and one that `is_agreed` belongs to no single rank.
    """
    rank, host = rank_hint(), socket.gethostname()
    error_file = os.environ.get(ERROR_FILE)
    is_written = False
    if error_file:
        failure = {
            "message": message,
            "exit_code": int(exit_code),
            "rank": rank,
            "host": host,
            "traceback": trace,
            "consequence": consequence,
            "is_agreed": is_agreed,
            "time": failed_at,
            "timestamp": int(failed_at),  # torchrun's name for it, in whole seconds
        }
        with suppress(OSError):  # a full disk: it is printed here instead
            _write(error_file, failure)
            is_written = True
    is_common = is_agreed or ExitCode.is_common(exit_code)
    is_shown = is_written and launched_by() in OUR_LAUNCHERS
    if not is_shown and (not rank or not is_common):
        who = "" if rank is None or is_agreed else f"rank {rank} on {host}: "
        print(printable(f"{trace or ''}disttrain: {who}{message}"), file=sys.stderr, flush=True)


def report_finished() -> None:
    """Write to the launcher's file that this worker did what it was started for.

    Without that, an exit code of 0 may come from any library's `os._exit(0)`. torchrun does not use it, and would leave
    the file behind.
    """
    error_file = os.environ.get(ERROR_FILE)
    if error_file and launched_by() in OUR_LAUNCHERS:
        now = time.time()
        done = {"message": "finished", "exit_code": int(ExitCode.DONE), "time": now, "timestamp": int(now)}
        with suppress(OSError):
            _write(error_file, done)


def report_ready(
    *,
    is_ready: bool = False,
    is_through: bool = False,
    can_lead: bool = False,
    joins: bool = False,
    generation: int = 0,
    failed: bool = False,
    hung: Sequence[int] = (),
    corrupt: Sequence[int] = (),
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write to the launcher's file whether this worker can continue without another one, or waits to join them.

    It `is_through` if it has made all steps and no longer needs the others, and `can_lead` if that other may be rank 0.
    In this `generation`: `failed` if its group did not form, or broke although no worker died; `hung` are the ranks
    that hold up the others, `corrupt` those that compute wrong numbers. `sources`: digests of what it computes with.
    """
    error_file = os.environ.get(ERROR_FILE)
    if error_file and launched_by() in OUR_LAUNCHERS:
        words = {
            "ready": is_ready,
            "through": is_through,
            "leads": can_lead,
            "joins": joins,
            "generation": generation,
            "failed": failed,
            "hung": list(hung),
            "corrupt": list(corrupt),
            "sources": dict(sources or {}),
        }
        with suppress(OSError):
            _write(error_file, words)


def says_finished(error_file: Path | str) -> bool:
    """Whether the worker that was given this file wrote that it finished."""
    try:
        return ending.says_finished(parse_json(Path(error_file).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _write(error_file: str, report: dict[str, Any]) -> None:
    # In place: it is read when this process is gone, and our launcher's file has no name to rename to.
    Path(error_file).write_text(json.dumps(report), encoding="utf-8")
