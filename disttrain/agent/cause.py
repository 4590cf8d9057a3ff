"""Why the workers of a group ended, and how the nodes inform each other."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from disttrain.errors import ExitCode

FINAL_CODES = (ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.STOPPED, ExitCode.CONFIGURATION)
"""The exit codes of a worker after which a restart cannot help, or is not wanted."""

_FINAL, _FIRST = "disttrain/final", "disttrain/first"
_POLL_S = 0.1


@dataclass(frozen=True)
class Cause:
    """What ended a worker.

    Args:
        code: the resulting exit code of the job.
        message: for the user, with the rank and the host that it happened to.
        traceback: of an unexpected failure.
        is_consequence: whether it is mostly another worker's failure, as a lost connection is.
    """

    code: int
    message: str
    traceback: str | None = None
    is_consequence: bool = False

    @property
    def is_final(self) -> bool:
        """Whether the workers are not to be started again."""
        return self.code in FINAL_CODES


def first_cause(failures: Mapping[int, ProcessFailure], host: str) -> Cause:
    """The cause among the failures of a node's workers, by rank: what is explained before what is a consequence."""
    causes = [(_order(failure), _cause(rank, failure, host)) for rank, failure in failures.items()]
    return min(causes, key=lambda one: one[0])[1] if causes else Cause(ExitCode.FAILURE, f"a worker on {host} ended")


def left_early(rank: int, host: str) -> Cause:
    """The cause when a worker exited with 0 but did not report that it had finished."""
    return Cause(
        ExitCode.FAILURE,
        f"rank {rank} on {host} exited with code 0 before its work was done: code that it runs called os._exit(0)",
    )


def _order(failure: ProcessFailure) -> tuple[int, float]:
    report = _report(failure)
    killed_from_outside = failure.exitcode < 0 and failure.exitcode != -signal.SIGABRT
    kind = 0 if failure.exitcode in FINAL_CODES else 1 if killed_from_outside else 3 if report.get("consequence") else 2
    return kind, float(report.get("time", failure.timestamp))


def _cause(rank: int, failure: ProcessFailure, host: str) -> Cause:
    report, code = _report(failure), failure.exitcode
    who = f"rank {rank} on {report.get('host', host)}"
    if code < 0:
        why = " (usually because the machine ran out of memory)" if code == -signal.SIGKILL else ""
        with suppress(ValueError):
            return Cause(ExitCode.FAILURE, f"{who} was killed by {signal.Signals(-code).name}{why}")
        return Cause(ExitCode.FAILURE, f"{who} was killed by signal {-code}")
    if not report:
        return Cause(code, f"{who} exited with code {code} without giving a reason")
    told_by_all = report.get("is_agreed") is True or code in (ExitCode.STOPPED, ExitCode.DIVERGED)
    message = str(report["message"]) if told_by_all else f"{who}: {report['message']}"
    return Cause(code, message, report.get("traceback"), report.get("consequence") is True)


def _report(failure: ProcessFailure) -> dict[str, Any]:
    """What the worker wrote to its error file, if anything that can be read."""
    report = failure.error_file_data  # of torch's own making, with no more than a message, if there was no file
    is_ours = isinstance(report, dict) and "exit_code" in report and "message" in report
    return report if is_ours and report["exit_code"] != ExitCode.DONE else {}


class Bulletin:
    """What the nodes of one round of rendezvous share through its store; the store may be gone."""

    def __init__(self, store: Store, node: int, num_nodes: int) -> None:
        self._store, self._node, self._num_nodes = store, node, num_nodes

    def announce(self, cause: Cause) -> None:
        """Announce that the job ends for this cause; the first announcement counts."""
        self._put(_FINAL, cause)

    def ended(self) -> Cause | None:
        """The cause for which the job ends, if a node has announced one."""
        return self._read(_FINAL)

    def first(self) -> Cause | None:
        """The first cause of a failure that a node has reported."""
        return self._read(_FIRST)

    def first_of_all(self, cause: Cause, patience_s: float) -> Cause:
        """What other nodes reported as the cause, if this one is a consequence; reports it to them if it is not."""
        if not cause.is_consequence:
            self._put(_FIRST, cause)
            return cause
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            found = self.ended() or self.first()
            if found is not None:
                return found
            time.sleep(_POLL_S)
        return cause

    def end_of_all(self, cause: Cause, patience_s: float, *, is_sure: bool) -> Cause:
        """How the job ends on all nodes that were asked to stop.

        One worker that ended by saving is proof that all have saved, whatever became of the others after that: a node
        that is not sure of its own end waits for another's report.
        """
        if not is_sure:
            deadline = time.monotonic() + patience_s if self._num_nodes > 1 else 0.0
            while self.ended() is None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        found = self.ended()
        if found is None and cause.is_final:
            self.announce(cause)
        return found or cause

    def leave(self, patience_s: float, *, serves: bool) -> None:
        """Report that this node has read everything; the one that serves the store waits until all others have."""
        with suppress(RuntimeError):
            self._store.set(f"disttrain/left/{self._node}", "")
            if serves:
                others = [f"disttrain/left/{node}" for node in range(self._num_nodes)]
                self._store.wait(others, timedelta(seconds=patience_s))

    def _put(self, key: str, cause: Cause) -> None:
        with suppress(RuntimeError):
            self._store.compare_set(key, "", json.dumps(asdict(cause)))

    def _read(self, key: str) -> Cause | None:
        with suppress(RuntimeError, ValueError, TypeError):
            if self._store.check([key]):
                return Cause(**json.loads(self._store.get(key)))
        return None
