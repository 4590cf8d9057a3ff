"""Put into words what came of a command: which rank failed, with what, and what the others were doing."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

from disttrain.testing import diagnosis, stacks
from disttrain.testing.crew import Reply

_MOST_THREADS = 4
_LOST = ("Connection reset by peer", "Connection closed by peer", "Connection refused", "Broken pipe")


def how_it_ended(reply: Reply) -> str:
    """How a rank ended that never answered: `was killed by SIGSEGV`, with its last stack if it left one."""
    status = reply.content["status"]
    if status is None:
        text = "hung up without an answer"
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        text = f"was killed by {name}"
    else:
        text = f"exited with code {os.WEXITSTATUS(status)} before it was done, without an exception"
    left = stacks.parse(reply.content["stacks"])
    return text + (":\n" + stacks.render(left[0]) if left else "")


def causes_first(failed: Sequence[Reply]) -> tuple[list[Reply], list[Reply]]:
    """The ranks that failed, split into causes, earliest first, and those that only lost their connection to one."""
    ordered = sorted(failed, key=lambda reply: (reply.kind != "died", reply.time))
    causes = [reply for reply in ordered if not _lost_connection(reply)]
    return (causes, [reply for reply in ordered if _lost_connection(reply)]) if causes else (ordered, [])


def brief(reply: Reply) -> str:
    """One line on a rank that failed: its exception's last line, or how it died."""
    if reply.kind == "died":
        return how_it_ended(reply).splitlines()[0].rstrip(":")
    if reply.kind == "error":
        return str(reply.content["brief"]).splitlines()[0]
    longrepr = reply.content["report"]["longrepr"]
    if isinstance(longrepr, dict) and longrepr.get("reprcrash"):
        return str(longrepr["reprcrash"]["message"]).splitlines()[0]
    lines = str(longrepr).strip().splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E  ")]  # pytest's mark; its last line is a place
    return (marked or lines or ["failed"])[-1]


def _lost_connection(reply: Reply) -> bool:
    return reply.kind in ("error", "report") and any(words in brief(reply) for words in _LOST)


def where_it_is(reply: Reply, history: diagnosis.History) -> str:
    """What a rank that has not answered was doing: the collective it is in, and the stack of each of its threads."""
    if reply.content["stopped"]:
        return "is stopped by a signal (SIGSTOP)"
    threads = reply.content["stacks"]
    where = diagnosis.waiting_in(history)
    text = "was still running" if where is None else f"was {where}"
    if not threads:
        unknown = (
            "it had not come to the test's code" if reply.content["answered"] else "it does not even show its stack"
        )
        return f"{text}; {unknown}"
    # The main thread, and others only if they run the user's code.
    others = [thread for thread in threads[1:] if any(frame.is_users for frame in thread)][:_MOST_THREADS]
    return text + "".join(f"\n{stacks.render(thread)}" for thread in [threads[0], *others])


def where_the_others_were(
    replies: Sequence[Reply], histories: Mapping[int, diagnosis.History], cut_off: Sequence[Reply] = ()
) -> str:
    """A paragraph for each rank that did not come to an end by itself, and a line for those that finished."""
    paragraphs = []
    for reply in cut_off:
        paragraphs.append(f"rank {reply.rank} lost its connection: {brief(reply)}")
        calls = histories[reply.rank].calls
        if calls:
            paragraphs[-1] += f"\n    its last call was {calls[-1].describe()} at {calls[-1].place()}"
    done = [reply.rank for reply in replies if not reply.failed]
    for reply in replies:
        if reply.kind == "hung":
            paragraphs.append(f"rank {reply.rank} {where_it_is(reply, histories[reply.rank])}")
    if done:
        paragraphs.append(f"{diagnosis.name_ranks(done)} {'was' if len(done) == 1 else 'were'} done")
    return "\n".join(paragraphs)


def difference(histories: Mapping[int, diagnosis.History]) -> str | None:
    """The first collective in which the ranks went different ways, if they did."""
    return diagnosis.first_difference(histories)
