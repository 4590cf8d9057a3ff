"""`disttrain doctor`."""

from __future__ import annotations

import json

import click

from disttrain_launch.cli.arguments import RECIPE, run_dir_callback
from disttrain_launch.cli.options import json_option, override_arguments, overrides_option
from disttrain_launch.cli.worker_commands import become

_PORTS = range(1, 65536)


def _host_and_port(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) not in _PORTS:
        raise click.BadParameter(f"{value!r} should be HOST:PORT, as in node-0:29500.", ctx, parameter)
    return value


@click.command(short_help="Try what training needs here.")
@click.argument("recipe", required=False, type=RECIPE)
@overrides_option
@click.option(
    "--run-dir",
    callback=run_dir_callback,
    default="runs",
    show_default=True,
    metavar="DIR|URL",
    help="The folder, or the URL, in which runs are to live; what the check makes there it removes.",
)
@click.option(
    "--rendezvous",
    metavar="HOST:PORT",
    callback=_host_and_port,
    help="Where the workers of several machines are to meet.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1, max=3600),
    default=20.0,
    show_default=True,
    help="Seconds after which a check without an answer counts as a failure.",
)
@click.option("--kubernetes", is_flag=True, help="Ask the cluster, too, whether it allows what `disttrain k8s` does.")
@click.option("--context", help="Of the kubeconfig, for --kubernetes.")
@click.option("--namespace", help="For --kubernetes.")
@json_option
def doctor(
    recipe: str | None,
    overrides: tuple[str, ...],
    run_dir: str,
    rendezvous: str | None,
    timeout: float,
    kubernetes: bool,
    context: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Try for real what breaks in practice: libraries, GPUs, collectives, network, files, the tracking server.

    With RECIPE, a shipped one or a TOML file, its data set and tracking server, too. Exit code 78 if something cannot
    work, with the remedy.
    """
    if overrides and recipe is None:
        raise click.UsageError("-o changes a key of a recipe: give RECIPE, too.")
    arguments = [*override_arguments(overrides), "--run-dir", run_dir, "--timeout", str(timeout)]
    arguments += ["--rendezvous", rendezvous] if rendezvous else []
    if kubernetes:
        from disttrain_launch.kubernetes.permissions import permissions

        arguments += ["--found", json.dumps(permissions(context, namespace))]
    arguments += ["--json"] * as_json
    become("disttrain.commands.doctor", *arguments, "--", *([recipe] if recipe is not None else []))
