"""Which workers a run has continued without, by its journal."""

from __future__ import annotations

import os
from contextlib import suppress

from disttrain.files import open_to_read, parse_json


def losses(journal: str | os.PathLike[str]) -> tuple[list[int], float]:
    """The ranks of the workers that were lost, oldest first, and the seconds that this took in all.

    Of workers that were started as these ranks, in runs that continued. Lines that are damaged are skipped.
    """
    ranks: list[int] = []
    total_s = 0.0
    with suppress(OSError), open_to_read(journal) as file:
        for line in file:
            if b'"worker-lost"' not in line:
                continue
            with suppress(ValueError, RecursionError):
                match parse_json(line):
                    case {"name": "worker-lost", "lost_ranks": [*lost], "seconds": int() | float() as seconds}:
                        ranks += [rank for rank in lost if isinstance(rank, int)]
                        total_s += seconds
    return ranks, round(total_s, 3)
