"""Why the workers of a group ended, and how the nodes inform each other."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from disttrain.distributed.ending import Ending, Report
from disttrain.errors import ExitCode

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
        return ExitCode.is_final(self.code)


def first_cause(failures: Mapping[int, ProcessFailure], host: str) -> Cause:
    """The cause among the failures of a node's workers, by rank: what is explained before what is a consequence."""
    endings = [
        # The content of the error file is of torch's own making, with a message alone, if there was no file.
        Ending(rank, failure.exitcode, float(failure.timestamp), Report.of(failure.error_file_data))
        for rank, failure in failures.items()
    ]
    if not endings:
        return Cause(ExitCode.FAILURE, f"a worker on {host} ended")
    first = min(endings, key=lambda ending: ending.order)
    words, report = first.message if first.is_common else first.told(host), first.report
    return Cause(
        first.exit_code, words, report.traceback if report else None, report is not None and report.is_consequence
    )


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
