"""The command `disttrain`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from disttrain.terminal.output import have_standard_streams
from disttrain_launch.messages import complain

# What there is: the module, which is imported when the command is called for, and what `--help` says of it.
_COMMANDS = {
    "doctor": ("disttrain.commands.doctor", "Check this machine for what training needs."),
    "evaluate": ("disttrain.commands.evaluate", "Evaluate a run or a checkpoint on the test set."),
    "k8s": ("disttrain_launch.cli.k8s", "Train on a Kubernetes cluster."),
    "node": ("disttrain_launch.cli.node", "Run this machine's part of a multi-machine job."),
    "predict": ("disttrain.commands.predict", "Predict from files with a run or a checkpoint."),
    "prove": ("disttrain_launch.cli.prove", "Prove that RECIPE gives the same bits, however it is disturbed."),
    "recipe": ("disttrain_launch.cli.recipe", "Inspect recipes."),
    "runs": ("disttrain.commands.runs", "Inspect runs and their checkpoints."),
    "slurm": ("disttrain_launch.cli.slurm", "Train on a Slurm cluster."),
    "stop": ("disttrain_launch.cli.stop", "Ask a run to save and stop."),
    "sync": ("disttrain.commands.sync", "Upload records that MLflow missed during an outage."),
    "train": ("disttrain_launch.cli.train", "Train a recipe, or resume a run."),
}


# What `prove` and other launchers call their number of workers.
_LIKE_N = ("--workers", "--nproc", "--nproc-per-node", "--nproc_per_node", "--num-processes", "--num_processes")


class _Commands(click.Group):
    """A group whose commands may raise the errors of disttrain."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        have_standard_streams()
        return super().main(*arguments, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = _COMMANDS[cmd_name][0]
        if module.startswith("disttrain_launch."):
            command: click.Command = getattr(import_module(module), cmd_name)
            return command
        from disttrain_launch.cli import launched

        starts = {"evaluate": launched.by_workers, "doctor": launched.examined}
        return launched.launched(cmd_name, module, starts.get(cmd_name, launched.alone))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            known = {name for one in (error.ctx or ctx).command.params for name in one.opts}
            if error.option_name in _LIKE_N and "--num-workers" in known:
                hint = f"{error.message} Did you mean -n (--num-workers)?"
                raise click.NoSuchOption(error.option_name, hint, ctx=error.ctx) from None
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # the reader of the output is gone, as with `head`
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
    """Distributed training for PyTorch: the same bits anywhere, and nothing lost.

    Try `disttrain train digits -n 2` first.
    """
