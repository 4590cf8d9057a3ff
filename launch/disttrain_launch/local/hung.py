"""Which workers hold up the others, by what their watchdogs report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def hung_ranks(reports: Mapping[int, Sequence[int]]) -> set[int]:
    """The ranks to be killed so that the others can continue; none as long as there is a doubt.

    `reports` has for each rank that runs the ranks that its watchdog, or an audit, names, or none. A watchdog judges by
    what it has heard, and on a busy machine may not have heard a rank in time that only waits. So a rank has to be
    named by every other one, but for those that are killed with it: what is stopped reports nothing.
    """
    said = [set(named) for named in reports.values() if named]
    named_by_all = set.intersection(*said) & reports.keys() if said else set()
    has_doubt = any(not named for rank, named in reports.items() if rank not in named_by_all)
    return set() if has_doubt else named_by_all
