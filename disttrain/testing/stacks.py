"""Read what faulthandler wrote about a worker, and show it as a traceback that starts in the user's code."""

from __future__ import annotations

import linecache
import os
import re
from dataclasses import dataclass

_FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<name>.*)$')
_NOT_THE_USERS = (
    os.path.dirname(__file__) + os.sep,
    f"{os.sep}_pytest{os.sep}",
    f"{os.sep}pluggy{os.sep}",
    f"{os.sep}site-packages{os.sep}hypothesis{os.sep}",
    f"{os.sep}threading.py",
    "<string>",
    "<frozen",
)
_TORCH = f"{os.sep}site-packages{os.sep}torch{os.sep}"


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    path: str
    line: int
    name: str

    @property
    def is_users(self) -> bool:
        """Neither torch's nor the harness's."""
        return _TORCH not in self.path

    @property
    def place(self) -> str:
        """path:line, the path as short as possible from here."""
        return f"{shown(self.path)}:{self.line}"


def is_machinery(path: str) -> bool:
    """Whether a file is of what calls the user's code and is called back: pytest, Hypothesis, the harness."""
    return any(part in path for part in _NOT_THE_USERS)


def shown(path: str) -> str:
    """A path relative to the current directory if it lies within."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):
        return path
    return path if relative.startswith("..") else relative


def parse(text: str) -> list[list[Frame]]:
    """The stacks of the last dump in `text`, one per thread, main thread first, innermost frame last."""
    stacks: list[list[Frame]] = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x", "Stack (most recent")):
            stacks.append([])
        elif (match := _FRAME.match(line)) is not None:
            if not stacks:
                stacks.append([])
            frame = Frame(match["path"], int(match["line"]), match["name"])
            if not is_machinery(frame.path):
                stacks[-1].append(frame)
    # faulthandler lists the newest thread first, and in each the innermost frame first.
    return [list(reversed(stack)) for stack in reversed(stacks) if stack]


def render(frames: list[Frame], indent: str = "    ") -> str:
    """The frames as a traceback, innermost last; torch's own frames are counted, not shown, below the user's last."""
    users = [number for number, frame in enumerate(frames) if frame.is_users]
    last = users[-1] if users else len(frames) - 1
    lines = []
    for frame in frames[: last + 1]:
        lines.append(f"{indent}{frame.place} in {frame.name}")
        code = linecache.getline(frame.path, frame.line).strip()
        if code:
            lines.append(f"{indent}    {code}")
    inner = frames[last + 1 :]
    if inner:
        lines.append(f"{indent}... {inner[-1].name} in torch ({os.path.basename(inner[-1].path)}:{inner[-1].line})")
    return "\n".join(lines)
