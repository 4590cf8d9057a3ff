"""What may go wrong, as one small vocabulary: who is hit, when, and by what.

    faults.kill(1, at="checkpoint: written")        SIGKILL to rank 1 when it comes to that point of the code
    faults.kill(0, step=12)                         ... at the point "step" with step=12
    faults.kill("launcher", after_s=2.0)            ... to the process that started rank 0, two seconds in
    faults.terminate(0, step=3), faults.stop(1, step=3)      SIGTERM, SIGSTOP
    faults.slow(1, 0.2, at="step")                  rank 1 sleeps 0.2 s each time
    faults.leave(1, code=3, step=5)                 rank 1 exits on the spot
    faults.fail(0, errno.ENOSPC, at="...")          the point raises OSError in rank 0
    faults.tear(path, at="...")                     the file loses its second half
    faults.flip(1, "gradient", step=5)              a bit of a gradient, or of a "weight", is another one, silently
    faults.refuse_writes(path, errno.EIO)           nothing can be created, renamed or removed under the path any more

Hand them to `workers(faults=[...])`, to `@pytest.mark.distributed(faults=[...])`, or arm processes of your own:

    with faults.armed(fault) as env:
        subprocess.run(command, env=os.environ | env)
    assert fault.happened

Points are named in the code under test with `disttrain.faultpoints.reached("...")`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from disttrain.faultpoints import VARIABLE
from disttrain.testing.errors import is_whole, wrong

Target = int | Literal["launcher"] | None
_FATAL = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)


class Fault:
    """Something that will go wrong. `happened` reports where and when it did, also after the process is gone."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._description = {key: value for key, value in description.items() if value is not None}
        self._seen: list[dict[str, Any]] = []
        self._record: Path | None = None

    def __repr__(self) -> str:
        return f"Fault({', '.join(f'{key}={value!r}' for key, value in self._description.items())})"

    @property
    def happened(self) -> list[dict[str, Any]]:
        """One entry for each time: `point`, `rank`, `pid`, `time` (unix seconds), and the point's own fields."""
        if self._record is not None and self._record.exists():
            self._seen = [json.loads(line) for line in self._record.read_text().splitlines()]
        return self._seen

    @property
    def rank(self) -> int | None:
        """The rank that it hits; None for every rank and for the launcher."""
        rank: int | None = self._description.get("rank")
        return rank if self._description.get("target") != "launcher" else None

    def took(self, rank: int) -> bool:
        """Whether this fault has ended or stopped that rank."""
        hits_itself = self._description.get("target") != "launcher"
        ends = self._description["action"] == "exit" or self._description.get("signal") in _FATAL
        return hits_itself and ends and any(entry["rank"] == str(rank) for entry in self.happened)


@contextlib.contextmanager
def armed(*faults: Fault) -> Iterator[dict[str, str]]:
    """The environment variable that arms these faults, in processes that are started with it."""
    with tempfile.TemporaryDirectory(prefix="disttrain-faults-") as directory:
        armed_faults = []
        for number, fault in enumerate(faults):
            fault._record = Path(directory) / str(number)
            armed_faults.append(fault._description | {"record": str(fault._record)})
        try:
            yield {VARIABLE: json.dumps(armed_faults)}
        finally:
            for fault in faults:
                fault._seen = fault.happened
                fault._record = None


def send(
    to: Target,
    with_signal: signal.Signals,
    *,
    at: str | None = None,
    step: int | None = None,
    count: int | None = None,
    after_s: float | None = None,
    times: int | None = 1,
) -> Fault:
    """A signal to a rank (None: to every rank), or to the launcher: the parent process of rank 0.

    Args:
        at: the point of the code; "step" if only `step` is given.
        step: only when the point reports this step.
        count: only the count-th time that a process comes to the point (1: the first).
        after_s: a moment instead of a point, in seconds from the start of the process.
        times: how often at most, over all processes and restarts (None: without end).
    """
    action = {"action": "signal", "signal": int(with_signal), "target": "launcher" if to == "launcher" else None}
    return Fault(action | _when(0 if to == "launcher" else to, at, step, count, after_s, times))


def kill(to: Target, **when: Any) -> Fault:
    """SIGKILL: gone at once, nothing is cleaned up. `when`: see `send`."""
    return send(to, signal.SIGKILL, **when)


def terminate(to: Target, **when: Any) -> Fault:
    """SIGTERM: a request to stop. `when`: see `send`."""
    return send(to, signal.SIGTERM, **when)


def stop(to: Target, **when: Any) -> Fault:
    """SIGSTOP: the process stands still and holds everything it has, as on a machine that hangs. `when`: see `send`."""
    return send(to, signal.SIGSTOP, **when)


def slow(
    rank: int | None, seconds: float, *, at: str = "step", step: int | None = None, times: int | None = None
) -> Fault:
    """The rank sleeps that long at the point, each time (at most `times`)."""
    return Fault({"action": "slow", "seconds": seconds} | _when(rank, at, step, None, None, times))


def leave(
    rank: int | None, code: int = 1, *, at: str | None = None, step: int | None = None, count: int | None = None
) -> Fault:
    """The process exits on the spot with this code: no exception, no cleaning up."""
    return Fault({"action": "exit", "code": code} | _when(rank, at, step, count, None, 1))


def fail(
    rank: int | None,
    error: int,
    *,
    at: str,
    step: int | None = None,
    count: int | None = None,
    times: int | None = 1,
    path: str | os.PathLike[str] | None = None,
) -> Fault:
    """The point raises OSError with this errno (`errno.ENOSPC`, ...), as a system call there would have."""
    where = {"path": os.fspath(path)} if path is not None else {}
    return Fault({"action": "raise", "errno": error} | where | _when(rank, at, step, count, None, times))


def tear(
    path: str | os.PathLike[str],
    *,
    at: str,
    rank: int | None = None,
    keep: float = 0.5,
    step: int | None = None,
    count: int | None = None,
) -> Fault:
    """The file keeps only this part of its bytes, as after a power cut in the middle of a write."""
    return Fault({"action": "tear", "path": os.fspath(path), "keep": keep} | _when(rank, at, step, count, None, 1))


def flip(
    rank: int | None,
    what: Literal["gradient", "weight"],
    *,
    step: int | None = None,
    count: int | None = None,
    bit: int = 20,
    times: int | None = 1,
) -> Fault:
    """A bit of the model's first weight, at the beginning of a step, or of its gradient, after a backward pass.

    As a broken core or memory has it: nothing fails, and nothing says so.
    """
    at = {"weight": "step", "gradient": "backward"}[what]
    return Fault({"action": "flip", "what": what, "bit": bit} | _when(rank, at, step, count, None, times))


def refuse_writes(
    path: str | os.PathLike[str],
    error: int,
    *,
    rank: int | None = None,
    at: str | None = None,
    step: int | None = None,
) -> Fault:
    """From that point on (without one: from the start), Python's calls that would change something under `path` fail.

    These are open for writing, rename, remove, mkdir, link and truncate. Libraries in C++ or Rust that open files by
    themselves do not ask Python: for them there is `disttrain.testing.small_disk`, which is really full or read-only.
    """
    start = 0.0 if at is None and step is None else None
    place = os.path.abspath(path)
    return Fault({"action": "refuse", "path": place, "errno": error} | _when(rank, at, step, None, start, 1))


def _when(
    rank: int | None, at: str | None, step: int | None, count: int | None, after_s: float | None, times: int | None
) -> dict[str, Any]:
    if rank is not None and (not is_whole(rank) or rank < 0):
        everybody = "a rank (0, 1, ...), every rank (None) or, if it is a signal, the 'launcher'"
        raise wrong(f"a fault hits {everybody}, not {rank!r}", is_whole(rank))
    if at is None and step is not None:
        at = "step"
    if (at is None) == (after_s is None):
        raise ValueError("say when: at a point (at=..., or step=...) or at a moment (after_s=...), and not both")
    when = {"rank": rank, "point": at, "step": step, "count": count, "after_s": after_s}
    return {key: value for key, value in when.items() if value is not None} | {"times": times or 0}
