"""Commands that need torch: read here, by their own definition, so that mistakes show at once, and run elsewhere.

They are defined in `disttrain.commands`. What they were given is handed on as it was given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from disttrain_launch.local.group import WorkerGroup, module_arguments

Start = Callable[[str, Sequence[str], dict[str, Any]], None]
_WORDS = "disttrain_launch.words"


def become(module: str, words: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module`: one process, so signals and its exit code need no messenger."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *module_arguments(module, *words)])


def alone(module: str, words: Sequence[str], given: dict[str, Any]) -> NoReturn:
    """Run the command in this process's place."""
    become(module, words)


def by_workers(module: str, words: Sequence[str], given: dict[str, Any]) -> NoReturn:
    """Run the command in as many workers as `-n` says."""
    from disttrain_launch.local.workers import run_workers

    run_workers(WorkerGroup(module_arguments(module, *words), given["num_workers"]))


def examined(module: str, words: Sequence[str], given: dict[str, Any]) -> NoReturn:
    """Run the doctor, with what the cluster says of itself, which only a launcher can ask."""
    if given["kubernetes"]:
        from disttrain_launch.kubernetes.permissions import permissions

        words = ["--found", json.dumps(permissions(given["context"], given["namespace"])), *words]
    become(module, words)


def launched(name: str, module: str, start: Start) -> click.Command:
    """The command of a module, or its group of commands, to be started by `start`."""
    command: click.Command = import_module(module).command
    if not isinstance(command, click.Group):
        return _Launched(name, command, module, (), start)
    each: dict[str, click.Command] = {
        word: _Launched(word, one, module, (word,), start) for word, one in command.commands.items()
    }
    return click.Group(name, commands=each, help=command.help)


class _Launched(click.Command):
    def __init__(self, name: str, command: click.Command, module: str, before: Sequence[str], start: Start) -> None:
        super().__init__(name, params=command.params, help=command.help)
        self._module, self._before, self._start = module, before, start

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        self._start(self._module, [*self._before, *ctx.meta[_WORDS]], ctx.params)
