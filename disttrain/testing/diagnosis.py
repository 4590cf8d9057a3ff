"""Compare what the ranks called: which collective each is in, and where they went different ways."""

from __future__ import annotations

import json
import linecache
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disttrain.testing.stacks import shown


@dataclass(frozen=True)
class Call:
    """One call of a function of torch.distributed by one rank."""

    op: str
    collective: bool
    group: str
    ranks: tuple[int, ...]
    tensors: tuple[str, ...]
    details: tuple[tuple[str, str], ...]
    sites: tuple[tuple[str, int, str], ...]
    time: float

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same on every rank of the group."""
        return (self.op, self.tensors, self.details)

    def describe(self) -> str:
        """The call in words: `all_reduce(float32 [2, 3], op=SUM)`."""
        arguments = [*self.tensors, *(f"{name}={value}" for name, value in self.details)]
        return f"{self.op}({', '.join(arguments)})"

    def place(self) -> str:
        """Where it was called, with the source line, and by whom if that line is in a helper."""
        if not self.sites:
            return "an unknown place"
        path, line, name = self.sites[0]
        code = linecache.getline(path, line).strip()
        text = f"{shown(path)}:{line} in {name}" + (f": {code}" if code else "")
        if len(self.sites) > 1:
            path, line, name = self.sites[1]
            text += f" (from {shown(path)}:{line} in {name})"
        return text


@dataclass
class History:
    """The calls of one rank, in order."""

    calls: list[Call] = field(default_factory=list)
    inside: list[Call] = field(default_factory=list)  # entered and not left

    def of(self, group: str) -> list[Call]:
        """The collectives of one group; point-to-point calls have no counterpart to compare."""
        return [call for call in self.calls if call.collective and call.group == group]


def read_history(text: bytes) -> History:
    """Read what `disttrain.testing.trace` wrote. A torn last line (the worker was killed) is skipped."""
    history = History()
    open_calls: dict[int, Call] = {}
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "left" in record:
            open_calls.pop(record["left"], None)
            continue
        call = Call(
            op=record["op"],
            collective=record["collective"],
            group=record["group"],
            ranks=tuple(record["ranks"]),
            tensors=tuple(record["tensors"]),
            details=tuple(sorted(record["details"].items())),
            sites=tuple((path, line_number, name) for path, line_number, name in record["sites"]),
            time=record["time"],
        )
        history.calls.append(call)
        open_calls[record["number"]] = call
    history.inside = list(open_calls.values())
    return history


def first_difference(histories: Mapping[int, History], incomplete: bool = True) -> str | None:
    """The first collective in which the ranks of a group went different ways, each side with its call site.

    With `incomplete` false, a rank may have made fewer calls so far.
    """
    groups = {call.group: call.ranks for history in histories.values() for call in history.calls if call.collective}
    for group, ranks in groups.items():
        series = {rank: histories[rank].of(group) for rank in ranks if rank in histories}
        for index in range(max(len(calls) for calls in series.values())):
            made = {rank: calls[index] for rank, calls in series.items() if index < len(calls)}
            missing = [rank for rank in series if rank not in made]
            if len({call.signature for call in made.values()}) > 1:
                return _differing(index, made)
            if missing and incomplete:
                return _missing(index, made, missing, series)
    return None


def _differing(index: int, made: Mapping[int, Call]) -> str:
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for rank, call in made.items():
        kinds.setdefault((call.signature, call.sites[:1]), []).append(rank)
    lines = [f"The ranks do not agree on collective {index + 1} of their group:"]
    for ranks in kinds.values():
        call = made[ranks[0]]
        lines.append(f"  {name_ranks(ranks)} called {call.describe()} at {call.place()}")
    return "\n".join(lines)


def _missing(index: int, made: Mapping[int, Call], missing: list[int], series: Mapping[int, list[Call]]) -> str:
    sides: dict[tuple[Any, ...], list[int]] = {}
    for rank, call in made.items():
        sides.setdefault((call.signature, call.sites[:1]), []).append(rank)
    lines = [f"Collective {index + 1} of the group was called by some ranks only:"]
    for ranks in sides.values():
        lines.append(f"  {name_ranks(ranks)} called {made[ranks[0]].describe()} at {made[ranks[0]].place()}")
    for rank in missing:
        last = series[rank][-1] if series[rank] else None
        before = f"its last was {last.describe()} at {last.place()}" if last else "it called no collective at all"
        lines.append(f"  rank {rank} did not; {before}")
    return "\n".join(lines)


def name_ranks(ranks: list[int]) -> str:
    """ "rank 0", "ranks 0 and 2", "ranks 0, 1 and 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def never_to_return(histories: Mapping[int, History], pending: set[int], done: set[int]) -> bool:
    """Whether every pending rank waits in a collective that a rank which is done will never call."""
    if not pending or not done:
        return False
    for rank in pending:
        inside = [call for call in histories[rank].inside if call.collective]
        if not inside:
            return False
        call = inside[-1]
        position = len(histories[rank].of(call.group))
        if not any(other in done and len(histories[other].of(call.group)) < position for other in call.ranks):
            return False
    return True


def waiting_in(history: History) -> str | None:
    """The call of torch.distributed that a rank is in, in words; None if it is in none."""
    if not history.inside:
        return None
    call = history.inside[-1]
    return f"in {call.describe()} for {max(0.0, time.time() - call.time):.1f} s, called at {call.place()}"
