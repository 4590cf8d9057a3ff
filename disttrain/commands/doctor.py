"""`disttrain doctor`: what breaks in practice, tried for real. Imports no torch itself: that may be what is broken."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from types import FrameType
from typing import NoReturn

import click

from disttrain.doctor import Finding, Question, checks_for, examine
from disttrain.errors import ExitCode


@click.command(name="disttrain doctor")
@click.argument("recipe", required=False)
@click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
@click.option("--run-dir", default="runs", help="Where runs are to live: a folder or a URL.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where the workers of several machines are to meet.")
@click.option("--timeout", "limit_s", type=click.FloatRange(min=1), default=20.0, help="Seconds for each check.")
@click.option(
    "--found", metavar="JSON", default="[]", help="Findings of the launcher's own, to be reported with the others."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    run_dir: str,
    rendezvous: str | None,
    limit_s: float,
    found: str,
    as_json: bool,
) -> None:
    """Try what training needs; exit 78 if something cannot work."""
    signal.signal(signal.SIGTERM, _unwind)
    everything = chain(
        examine(checks_for(Question(run_dir, recipe, overrides, rendezvous)), limit_s),
        (Finding(**finding) for finding in json.loads(found)),
    )
    findings = list(everything if as_json else _told(everything))
    if as_json:
        print(json.dumps({"checks": [asdict(finding) for finding in findings]}))
    sys.stdout.flush()
    sys.exit(ExitCode.CONFIGURATION if any(finding.status == "failure" for finding in findings) else ExitCode.DONE)


def _told(found: Iterator[Finding]) -> Iterator[Finding]:
    """The findings as they come, each printed."""
    for finding in found:
        print(f"{finding.status:<8} {finding.name:<14} {finding.detail}", flush=True)
        if finding.remedy:
            print(textwrap.fill(finding.remedy, 96, initial_indent=" " * 24, subsequent_indent=" " * 24), flush=True)
        yield finding


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # through what removes what the checks have made


if __name__ == "__main__":
    command()
