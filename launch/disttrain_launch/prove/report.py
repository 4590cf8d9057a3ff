"""A proof in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADINGS = ("workers", "resumed with", "kills", "steps repeated", "weights", "optimizer", "same bits")
_OF_LOSSES = ("workers", "losses", "of ranks", "s per loss", "worst", "slices again", "restarts")
_HASH_DIGITS = 12


def as_table(result: dict[str, Any]) -> str:
    """The proof as a table, with a sentence under it."""
    reference, runs = result["reference"], result["runs"]
    rows = [_row(reference, "reference"), *(_row(run, "yes" if run["same"] else "NO") for run in runs)]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = [_line(row, widths) for row in (_HEADINGS, ["-" * width for width in widths], *rows)]
    return "\n".join([*lines, *_of_losses(result["runs"]), "", _verdict(result)])


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """1 worker, 2 workers, 0 kills."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def _of_losses(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A second table, of the workers that runs lost, if any were to."""
    rows = [
        [
            str(run["workers"]),
            str(run["losses"]),
            ", ".join(f"{rank} x{count}" for rank, count in run["lost_ranks"].items()) or "-",
            *([f"{run['seconds_per_loss'][name]:.2f}" for name in ("median", "worst")] if run["losses"] else "--"),
            str(run["slices_recomputed"]),
            str(run["restarts"]),
        ]
        for run in runs
        if "losses" in run
    ]
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(_OF_LOSSES, *rows, strict=True)]
    return ["", *(_line(row, widths) for row in (_OF_LOSSES, ["-" * width for width in widths], *rows))]


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


def is_proven(result: dict[str, Any]) -> bool:
    """Whether a proof shows what it was asked to: the same bits, after losses if there were to be any."""
    runs = result["runs"]
    has_losses = not result.get("losses_wanted") or all(run["losses"] for run in runs)
    return bool(result["same"] and has_losses and not any(run.get("restarts") for run in runs))


def _verdict(result: dict[str, Any]) -> str:
    reference, runs = result["reference"], result["runs"]
    kills, repeated = (sum(run[name] for run in runs) for name in ("kills", "steps_repeated"))
    losses, restarts = (sum(run.get(name, 0) for run in runs) for name in ("losses", "restarts"))
    scene = ", ".join(
        (
            counted(reference["steps"], "step"),
            counted(len(runs), "disturbed run"),
            *([counted(losses, "loss", "losses")] if any("losses" in run for run in runs) else []),
            counted(kills, "kill"),
            f"{counted(repeated, 'step')} repeated",
        )
    )
    if result["same"]:
        where = (
            "" if result["exact"] else f" with {counted(reference['workers'], 'worker')} (fast mode promises no more)"
        )
        lines = [f"same bits{where}: {scene}"]
        if restarts:
            lines.append(f"But {counted(restarts, 'loss', 'losses')} restarted the run.")
        wanted = result.get("losses_wanted", 0) * len(runs)
        if losses < wanted:
            lines.append(
                f"But only {losses} of {counted(wanted, 'loss', 'losses')} came before the end: give more --steps."
            )
        return "\n".join(lines)
    difference = result["first_difference"]
    what = f"'{difference['tensor']}'" if difference["tensor"] else f"the metric {difference['metric'] or 'state'}"
    until = f", after step {difference['same_until']} was the same" if difference["same_until"] is not None else ""
    return f"NOT the same bits: {scene}\nThe first difference is {what} at step {difference['step']}{until}."
