"""The command `disttrain`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from disttrain.terminal.output import have_standard_streams
from disttrain_launch.cli.doctor import doctor
from disttrain_launch.cli.node import node
from disttrain_launch.cli.prove import prove
from disttrain_launch.cli.recipe import recipe
from disttrain_launch.cli.runs import runs
from disttrain_launch.cli.stop import stop
from disttrain_launch.cli.train import train
from disttrain_launch.cli.worker_commands import evaluate, predict, sync
from disttrain_launch.messages import complain

# Imported when they are called for: `--help` waits for neither. Where they are, and what it says of them.
_LATE = {
    "k8s": ("disttrain_launch.cli.k8s", "Train on a Kubernetes cluster."),
    "slurm": ("disttrain_launch.cli.slurm", "Train on a Slurm cluster."),
}


class _Commands(click.Group):
    """A group whose commands may raise the errors of disttrain."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        have_standard_streams()
        return super().main(*arguments, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LATE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LATE:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(_LATE[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        limit = formatter.width - 6 - max(map(len, names))
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, _LATE[name][1] if name in _LATE else self.commands[name].get_short_help_str(limit))
                    for name in names
                ]
            )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # whoever read the output has gone, as `head` does
            from disttrain.recipe import ExitCode

            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(ExitCode.UNREAD)
        except Exception as error:
            from disttrain.recipe import DisttrainError  # here, because `--help` has no use for pydantic

            if not isinstance(error, DisttrainError):
                raise
            complain(str(error))
            ctx.exit(error.exit_code)


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"disttrain {version('disttrain')}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def main() -> None:
    """Distributed training on PyTorch that people can trust.

    The first command to try is `disttrain train digits -n 2`.
    """


for command in (train, node, stop, evaluate, predict, runs, sync, recipe, prove, doctor):
    main.add_command(command)
