"""Make one failure of what several ranks reported, in a form that pytest shows in colour and xdist can carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from _pytest._code.code import ExceptionChainRepr, ReprEntryNative, ReprFileLocation, ReprTraceback

from disttrain.testing import diagnosis, narrative
from disttrain.testing.crew import Reply

_Link = tuple[ReprTraceback, ReprFileLocation | None, str | None]


class RanksFailed(Exception):
    """Some ranks failed; `representation` is what pytest shows."""

    def __init__(self, representation: ExceptionChainRepr) -> None:
        super().__init__("some ranks failed")
        self.representation = representation


def merged(
    config: pytest.Config,
    replies: Sequence[Reply],
    failed: Sequence[Reply],
    histories: Mapping[int, diagnosis.History],
    world_size: int,
    reason: str | None,
    location: tuple[str, int | None, str],
) -> ExceptionChainRepr:
    """Each failing rank's report under a line with its rank; then where the other ranks were, and how they differ."""
    own, cut_off = narrative.causes_first([reply for reply in failed if reply.kind != "hung"])
    place = _place(location)
    chain: list[_Link] = []
    for reply in own:
        headline = _headline(reply.rank, world_size)
        if reply.kind == "report":
            chain.extend(_of_report(config, reply, world_size, place))
        else:
            text = "raised\n" + reply.content["text"] if reply.kind == "error" else narrative.how_it_ended(reply)
            chain.append(_link(f"{headline} {text}\n", f"rank {reply.rank}: {narrative.brief(reply)}", place))
    if not own:
        text = f"{world_size} {'workers' if world_size > 1 else 'worker'}, {reason}"
        chain.append(_link(text + "\n", text, place))
    representation = ExceptionChainRepr(chain)
    representation.reprcrash = chain[0][1]  # the cause is what the summary shows
    others = narrative.where_the_others_were(replies, histories, cut_off)
    if others:
        representation.addsection("the other ranks" if own else "the ranks", others, "-")
    differ = narrative.difference(histories)
    if differ:
        representation.addsection("the collectives", differ, "-")
    return representation


def _of_report(config: pytest.Config, reply: Reply, world_size: int, place: tuple[str, int]) -> list[_Link]:
    report = config.hook.pytest_report_from_serializable(config=config, data=reply.content["report"])
    shown = report.longrepr
    if not isinstance(shown, ExceptionChainRepr):
        text = f"{_headline(reply.rank, world_size)}\n{shown}\n"
        return [_link(text, f"rank {reply.rank}: {narrative.brief(reply)}", place)]
    return of_rank(shown.chain, reply.rank, world_size)


def of_rank(chain: Sequence[_Link], rank: int, world_size: int) -> list[_Link]:
    """The same traceback, under a line with the rank it is of."""
    links: list[_Link] = []
    for number, (traceback, crash, description) in enumerate(chain):
        if number == 0:
            entries = [ReprEntryNative([f"{_headline(rank, world_size)}\n"]), *traceback.reprentries]
            traceback = ReprTraceback(entries, traceback.extraline, traceback.style)
        if crash is not None:
            crash = ReprFileLocation(crash.path, crash.lineno, f"rank {rank}: {crash.message}")
        links.append((traceback, crash, description))
    return links


def _headline(rank: int, world_size: int) -> str:
    return f"rank {rank} of {world_size}"


def _link(text: str, brief: str, place: tuple[str, int]) -> _Link:
    location = ReprFileLocation(place[0], place[1], brief.splitlines()[0])
    return ReprTraceback([ReprEntryNative([text])], None, "native"), location, None


def text_only(text: str, location: tuple[str, int | None, str]) -> ExceptionChainRepr:
    """A failure that no rank reported: this text, at the test's own line."""
    return ExceptionChainRepr([_link(text + "\n", text, _place(location))])


def _place(location: tuple[str, int | None, str]) -> tuple[str, int]:
    return location[0], (location[1] or 0) + 1
