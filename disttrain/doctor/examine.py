"""All checks at once, each in a process of its own and with a time limit; the answers in the order of the list."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from disttrain.doctor.checks import Check
from disttrain.doctor.finding import Finding, failure
from disttrain.doctor.isolated import CrashedError, Isolated


def examine(checks: Sequence[Check], limit_s: float) -> Iterator[Finding]:
    """What the checks find. One that has no answer after `limit_s` seconds is a failure, like one that crashes.

    Forks, so this process must have no threads. Whatever happens, no process is left behind.
    """
    deadline = time.monotonic() + limit_s
    with ExitStack() as stack:
        running = []
        for check in checks:
            process = Isolated(check.look)
            stack.callback(process.end)
            running.append((check, process))
        for check, process in running:
            try:
                yield from (Finding(**found) for found in process.result(deadline))
            except TimeoutError:
                yield failure(
                    check.name,
                    f"no answer within {limit_s:g} s (--timeout gives a busy machine more)",
                    check.if_it_hangs,
                )
            except CrashedError as error:
                yield failure(check.name, f"the check itself failed: {error}", check.if_it_crashes)
