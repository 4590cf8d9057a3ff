"""A proof in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEADINGS = ("workers", "resumed with", "kills", "steps repeated", "weights", "optimizer", "same bits")
_HASH_DIGITS = 12


def as_table(result: dict[str, Any]) -> str:
    """The proof as a table, with a sentence under it."""
    reference, runs = result["reference"], result["runs"]
    rows = [_row(reference, "reference"), *(_row(run, "yes" if run["same"] else "NO") for run in runs)]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = [_line(row, widths) for row in (_HEADINGS, ["-" * width for width in widths], *rows)]
    return "\n".join([*lines, "", _verdict(result)])


def counted(count: int, noun: str) -> str:
    """1 worker, 2 workers, 0 kills."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _row(run: dict[str, Any], same: str) -> list[str]:
    return [
        " ".join([str(run["workers"]), *run.get("strategies", [])[:1]]),
        _resumed_with(run) or "-",
        str(run["kills"]),
        str(run["steps_repeated"]),
        run["weights_sha256"][:_HASH_DIGITS],
        run["optimizer_sha256"][:_HASH_DIGITS],
        same,
    ]


def _resumed_with(run: dict[str, Any]) -> str:
    counts = run.get("resumed_with", [])
    if "strategies" not in run:
        return " ".join(map(str, counts))
    return ", ".join(f"{count} {strategy}" for count, strategy in zip(counts, run["strategies"][1:], strict=True))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _verdict(result: dict[str, Any]) -> str:
    reference, runs = result["reference"], result["runs"]
    kills, repeated = (sum(run[name] for run in runs) for name in ("kills", "steps_repeated"))
    scene = ", ".join(
        (
            counted(reference["steps"], "step"),
            counted(len(runs), "disturbed run"),
            counted(kills, "kill"),
            f"{counted(repeated, 'step')} repeated",
        )
    )
    if result["same"]:
        where = (
            "" if result["exact"] else f" with {counted(reference['workers'], 'worker')} (fast mode promises no more)"
        )
        return f"same bits{where}: {scene}"
    difference = result["first_difference"]
    what = f"'{difference['tensor']}'" if difference["tensor"] else f"the metric {difference['metric'] or 'state'}"
    until = f", after step {difference['same_until']} was the same" if difference["same_until"] is not None else ""
    return f"NOT the same bits: {scene}\nThe first difference is {what} at step {difference['step']}{until}."
