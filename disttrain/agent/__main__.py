"""`python -m disttrain.agent`: what `disttrain node` becomes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from disttrain.agent.cause import Cause
from disttrain.agent.elastic import Agent, StoppedOnRequest, ignore_requests
from disttrain.agent.finished import is_finished
from disttrain.agent.led import refusal_at
from disttrain.distributed.requests import STOP_SIGNALS, heard_requests
from disttrain.errors import ConfigurationError, DisttrainError, ExitCode
from disttrain.layout import LAUNCHER_PID
from disttrain.runs.summary import newest_step
from disttrain.terminal.output import have_unbreakable_output

_MONITOR_S = 0.3
_TO_LEAVE_S = 15.0  # how long the node that serves the store waits for the others to have read it
_TO_RESOLVE_S = 60.0  # the name of a machine that was just started resolves some seconds later
_LOOK_EVERY_S = 0.5
_JOIN_S = 600
_LAST_CALL_S = 5  # once the minimum number of nodes is there, how long to wait for more


@click.command(name="python -m disttrain.agent", context_settings={"ignore_unknown_options": True})
@click.option("--nodes", nargs=2, type=int, required=True, help="The minimum and maximum number of nodes.")
@click.option("--rendezvous", required=True, metavar="HOST:PORT")
@click.option("--workers", type=int, required=True, help="Workers on this node.")
@click.option("--max-restarts", type=int, required=True)
@click.option("--job-id", required=True)
@click.option(
    "--serves",
    type=click.Choice(("true", "false", "unknown")),
    required=True,
    help="Whether the store of the rendezvous is on this node.",
)
@click.option("--local-addr", help="The address by which the other nodes reach this one.")
@click.option("--stop-grace", type=int, required=True, help="Seconds that workers may take to save.")
@click.option("--run-dir", required=True)
@click.option("--recipe", required=True, help="The workers' recipe; a run that is finished needs no node.")
@click.option("--override", "overrides", multiple=True, help="Changes to the recipe.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    nodes: tuple[int, int],
    rendezvous: str,
    workers: int,
    max_restarts: int,
    job_id: str,
    serves: str,
    local_addr: str | None,
    stop_grace: int,
    run_dir: str,
    recipe: str,
    overrides: tuple[str, ...],
    arguments: tuple[str, ...],
) -> None:
    """Run the workers `python ARGUMENTS` of this node, and exit with their own code."""
    signals = heard_requests()
    for number in signals:
        signal.signal(number, _stop)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we report it ourselves
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in signals)
    # With torch 2.14 a node that joins later is not given the address of a store that the nodes share.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[LAUNCHER_PID] = str(os.getpid())  # with which the workers end
    log_dir = tempfile.mkdtemp(prefix="disttrain-node-")

    def finished() -> bool:
        return is_finished(run_dir, recipe, overrides)

    try:
        # Blocked since `disttrain node` began: the first process of a container would never receive them otherwise.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        _leave_if(finished, run_dir)
        _wait_for_name(rendezvous, serves, finished, run_dir)
        handler = _handler(rendezvous, job_id, nodes, local_addr, serves=serves == "true")
        spec = WorkerSpec(
            role="worker",
            local_world_size=workers,
            entrypoint=sys.executable,
            args=tuple(argument.replace("$", "$$") for argument in arguments),  # torchrun fills in $-templates
            rdzv_handler=handler,
            max_restarts=max_restarts,
            monitor_interval=_MONITOR_S,
            local_addr=local_addr,
        )
        agent = Agent(
            spec,
            DefaultLogsSpecs(log_dir=log_dir),
            grace_s=stop_grace,
            host=socket.gethostname(),
            newest_step=lambda: newest_step(Path(run_dir)),
            is_finished=finished,
            say=_say,
        )
        _run(agent, handler, serves=serves == "true")
    except SignalException:
        _say("stopped before the workers were ready; run the same command again")
        raise click.exceptions.Exit(ExitCode.STOPPED) from None
    except RendezvousError as error:
        _leave_if(finished, run_dir)  # by the others, who are gone now
        host, _, port = rendezvous.rpartition(":")
        if refusal := refusal_at(host.strip("[]"), int(port), job_id):
            raise ConfigurationError(refusal) from error
        raise DisttrainError(
            f"job {job_id!r}: the nodes cannot find each other at {rendezvous} ({_deepest(error)}). The node with "
            f"--node-rank 0 must serve that address, and at least {nodes[0]} must join within {_JOIN_S} s."
        ) from error
    finally:
        shutil.rmtree(log_dir, ignore_errors=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SignalException("asked to stop", signal.Signals(number))


def _leave_if(finished: Callable[[], bool], run_dir: str) -> None:
    """Raise click's Exit if the run is finished."""
    if finished():
        _say(f"{run_dir} is already finished: there is nothing left to do")
        raise click.exceptions.Exit(ExitCode.DONE)


def _wait_for_name(rendezvous: str, serves: str, finished: Callable[[], bool], run_dir: str) -> None:
    """Wait until the rendezvous has an address. Raises DisttrainError if it gets none: a retry may help."""
    host = rendezvous.rpartition(":")[0].strip("[]")
    deadline = time.monotonic() + _TO_RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            where = f"--rendezvous {rendezvous}: the name {host!r} does not resolve here ({error.strerror})"
            if serves == "unknown":
                raise DisttrainError(
                    f"{where}, so it is unknown which machine serves it. Give an address, or --node-rank."
                ) from error
            if time.monotonic() >= deadline:
                raise DisttrainError(f"{where}; give an address, or a name that every node knows.") from error
            time.sleep(_LOOK_EVERY_S)
            _leave_if(finished, run_dir)  # meanwhile, by the others
        else:
            return


def _handler(
    rendezvous: str, job_id: str, nodes: tuple[int, int], local_addr: str | None, *, serves: bool
) -> RendezvousHandler:
    """This node's part in the rendezvous. Raises RendezvousError."""
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=rendezvous,
        run_id=job_id,
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        local_addr=local_addr,
        join_timeout=_JOIN_S,
        last_call_timeout=_LAST_CALL_S,
        is_host=str(serves).lower(),
    )
    return get_rendezvous_handler(parameters)


def _run(agent: Agent, handler: RendezvousHandler, *, serves: bool) -> None:
    """Run the agent to its end. Raises click's Exit with the code of the job."""
    end: Cause | None
    try:
        result = agent.run()
    except StoppedOnRequest as stopped:
        end = stopped.end
    else:
        if result is None:  # more nodes joined than there was room for, and the others have ended
            raise RendezvousClosedError("the other nodes finished while this one was waiting to join")
        end = agent.cause if result.is_failed() else None
    ignore_requests()
    if end is None:
        handler.shutdown()
        return
    if end.traceback:
        print(end.traceback.rstrip(), file=sys.stderr)
    if end.message:
        _say(end.message)
    bulletin = agent.bulletin()
    if bulletin is not None:
        bulletin.leave(_TO_LEAVE_S, serves=serves)
    raise click.exceptions.Exit(end.code)


def _say(message: str) -> None:
    print(f"disttrain: {message}", file=sys.stderr, flush=True)


def _deepest(error: BaseException) -> str:
    """What was at the bottom of a chain of errors, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main() -> int:
    """The command, and its exit code."""
    have_unbreakable_output()
    try:
        with command.make_context(command.name, sys.argv[1:]) as context:
            command.invoke(context)
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except DisttrainError as error:
        _say(str(error))
        return error.exit_code
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
