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
from typing import TYPE_CHECKING, NoReturn

import click

from disttrain.commands.arguments import RECIPE, run_dir_callback
from disttrain.commands.options import json_option, overrides_option
from disttrain.errors import ExitCode

if TYPE_CHECKING:
    from disttrain.doctor import Finding

_PORTS = range(1, 65536)


def _host_and_port(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) not in _PORTS:
        raise click.BadParameter(f"{value!r} should be HOST:PORT, as in node-0:29500.", ctx, parameter)
    return value


def _needed_by_overrides(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None and ctx.params.get("overrides"):  # what is given is looked at before what is not
        raise click.UsageError("-o changes a key of a recipe: give RECIPE, too.", ctx)
    return value


@click.command(name="disttrain doctor")
@click.argument("recipe", required=False, type=RECIPE, callback=_needed_by_overrides)
@overrides_option
@click.option(
    "--run-dir",
    callback=run_dir_callback,
    default="runs",
    show_default=True,
    metavar="DIR|URL",
    help="The folder or URL where runs will live; whatever the check creates there is removed.",
)
@click.option(
    "--rendezvous",
    metavar="HOST:PORT",
    callback=_host_and_port,
    help="Where the workers of several machines will meet.",
)
@click.option(
    "--timeout",
    "limit_s",
    type=click.FloatRange(min=1, max=3600),
    default=20.0,
    show_default=True,
    help="Seconds after which a check without an answer counts as a failure.",
)
@click.option("--kubernetes", is_flag=True, help="Also check whether the cluster allows what `disttrain k8s` does.")
@click.option("--context", help="The kubeconfig context, for --kubernetes.")
@click.option("--namespace", help="For --kubernetes.")
@click.option("--found", metavar="JSON", default="[]", hidden=True, help="Findings of the launcher's own.")
@json_option
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    run_dir: str,
    rendezvous: str | None,
    limit_s: float,
    kubernetes: bool,
    context: str | None,
    namespace: str | None,
    found: str,
    as_json: bool,
) -> None:
    """Try for real what breaks in practice: libraries, GPUs, collectives, network, files, the tracking server.

    With RECIPE (a shipped one or a TOML file), also its data set and tracking server. Exit code 78 if something cannot
    work, with the remedy.
    """
    from disttrain.doctor import Finding, Question, checks_for, examine

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
