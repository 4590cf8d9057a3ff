"""Named points where a test may injure the run. Without armed faults a point is one comparison.

Code under test calls `reached("checkpoint: written")` where something may go wrong there in real life. Which faults are
armed is read once, from DISTTRAIN_FAULTS at import; `disttrain.testing.faults` writes it. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

VARIABLE = "DISTTRAIN_FAULTS"
_CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class _Armed:
    """The faults meant for this process, and how often each point was passed."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        self._faults = faults
        self._passed: dict[str, int] = {}
        for fault in faults:
            if fault.get("after_s") == 0:
                self._fire(fault, "start", {})
            elif "after_s" in fault:
                timer = threading.Timer(fault["after_s"], self._fire, (fault, "moment", {}))
                timer.daemon = True
                timer.start()

    def reached(self, name: str, where: dict[str, Any]) -> None:
        self._passed[name] = count = self._passed.get(name, 0) + 1
        for fault in self._faults:
            if fault.get("point") != name:
                continue
            if "step" in fault and where.get("step") != fault["step"]:
                continue
            if "count" in fault and count != fault["count"]:
                continue
            self._fire(fault, name, where)

    def _fire(self, fault: dict[str, Any], point: str, where: dict[str, Any]) -> None:
        if not _record(fault, point, where):
            return
        action = fault["action"]
        if action == "signal":
            os.kill(os.getppid() if fault.get("target") == "launcher" else os.getpid(), fault["signal"])
            if fault["signal"] in (signal.SIGKILL, signal.SIGSTOP) and fault.get("target") == "launcher":
                time.sleep(0.05)  # let it arrive before this process continues
        elif action == "slow":
            time.sleep(fault["seconds"])
        elif action == "exit":
            os._exit(fault["code"])
        elif action == "raise":
            raise OSError(fault["errno"], os.strerror(fault["errno"]), fault.get("path"))
        elif action == "tear":
            os.truncate(fault["path"], int(os.path.getsize(fault["path"]) * fault["keep"]))
        elif action == "flip":
            _flip(where["model"], fault["what"], fault["bit"])
        elif action == "refuse":
            _refuse_writes(fault["path"], fault["errno"])


def _record(fault: dict[str, Any], point: str, where: dict[str, Any]) -> bool:
    """Write down that it happened, before it does. False if it has happened often enough, perhaps before a restart."""
    record = fault.get("record")
    if record is None:
        return True
    times = fault["times"]
    if times and os.path.exists(record):
        with open(record) as lines:
            if sum(1 for _ in lines) >= times:
                return False
    line = {"point": point, "pid": os.getpid(), "rank": os.environ.get("RANK"), "time": time.time()}
    line |= {key: value for key, value in where.items() if key != "model"}
    with open(record, "a") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _flip(model: Any, what: str, bit: int) -> None:
    """Flip a bit of the first number of a model's first weight, or of its gradient, and leave no other trace."""
    torch = sys.modules["torch"]
    for parameter in model.parameters():
        tensor = parameter.data if what == "weight" else parameter.grad
        if tensor is not None:
            tensor.data.view(-1)[:1].view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            return


def _refuse_writes(path: str, error: int) -> None:
    """Have Python refuse what would change anything under the path, until the process ends."""
    inside = (path, path.rstrip(os.sep) + os.sep)

    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        else:
            changes = event in _CHANGING
        if changes:
            for place in args[:2]:
                if isinstance(place, (str, os.PathLike)):
                    full = os.path.abspath(place)
                    if full == inside[0] or full.startswith(inside[1]):
                        raise OSError(error, os.strerror(error), full)

    sys.addaudithook(check)


def _parse(text: str, rank: int | None) -> _Armed | None:
    every = json.loads(text) if text else []
    meant = [fault for fault in every if fault.get("rank") is None or fault["rank"] == rank]
    return _Armed(meant) if meant else None


def _own_rank() -> int | None:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else None


_armed = _parse(os.environ.get(VARIABLE, ""), _own_rank())


def arm(faults: str, *, rank: int | None = None) -> None:
    """Arm these faults (the text that DISTTRAIN_FAULTS would hold; empty: none) in place of those there are."""
    global _armed
    _armed = _parse(faults, rank)


def reached(name: str, **where: Any) -> None:
    """Report that the code has reached a named point; `where` may hold the step. Faults armed for it happen now."""
    if _armed is not None:
        _armed.reached(name, where)
