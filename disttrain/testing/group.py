"""Run functions in every worker of a real gloo group, and get their values back by rank."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from disttrain.distributed.ports import reserved_port
from disttrain.testing import narrative
from disttrain.testing.crew import Crew, Reply, listening_socket
from disttrain.testing.environment import environment
from disttrain.testing.errors import CollectivesDiffer, HarnessError, WorkerFailed, WorkerTimeout
from disttrain.testing.options import Options, default_timeout_s
from disttrain.testing.pool import default_pool
from disttrain.testing.preload import PROVIDERS
from disttrain.testing.spec import Preload, WorkerSpec

if TYPE_CHECKING:
    from disttrain.testing.faults import Fault
    from disttrain.testing.hosts import Cluster

_STORE_PORT = 29500  # in a network of our own, where it is free


@dataclass(frozen=True)
class Outcome:
    """The outcome of a function in one rank. `text` describes it: a traceback, how the rank died, or where it hangs."""

    rank: int
    state: str  # "returned", "raised", "died" or "hung"
    value: Any = None
    error: BaseException | None = None
    text: str = ""


class Group:
    """Workers that stay up from one `run` to the next, with one process group. Made by `workers`."""

    def __init__(self, crew: Crew, timeout_s: float, check_collectives: bool, faults: Sequence[Fault]) -> None:
        self.crew = crew
        self.timeout_s = timeout_s
        self.check_collectives = check_collectives
        self.faults = tuple(faults)

    @property
    def world_size(self) -> int:
        """How many workers there are."""
        return len(self.crew.workers)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids, by rank."""
        return [worker.pid for worker in self.crew.workers]

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` in every worker; returns the values by rank.

        Raises:
            WorkerFailed: a rank raised or died.
            WorkerTimeout: not done in time, or stuck for good.
            CollectivesDiffer: all returned, but the ranks called different collectives.
        """
        __tracebackhide__ = True
        replies, reason = self._call(function, args, kwargs, patient=False)
        self.raise_for(replies, reason)
        return [reply.content["value"] for reply in replies]

    def attempt(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Outcome]:
        """As `run`, but raises nothing: the outcome of each rank, each having had the whole timeout. For faults."""
        replies, _ = self._call(function, args, kwargs, patient=True)
        return [self._outcome(reply) for reply in replies]

    def raise_for(self, replies: Sequence[Reply], reason: str | None) -> None:
        """Raise what `run` documents, if anything failed."""
        __tracebackhide__ = True
        histories = self.crew.histories()
        failed, cut_off = narrative.causes_first([reply for reply in replies if reply.kind in ("error", "died")])
        differ = narrative.difference(histories) if self.check_collectives or failed or reason else None
        others = narrative.where_the_others_were(replies, histories, cut_off)
        tail = "".join(f"\n\n{part}" for part in (others, differ) if part)
        if failed:
            texts = [f"rank {reply.rank} of {self.world_size} {_describe(reply)}" for reply in failed]
            cause = self._outcome(failed[0]).error
            raise WorkerFailed("\n\n".join(texts) + tail, failed[0].rank, cause) from cause
        hung = [reply.rank for reply in replies if reply.kind == "hung"]
        if hung:
            raise WorkerTimeout(f"{self.world_size} workers, {reason}{tail}", hung[0])
        if differ and self.check_collectives and not self.crew.spent:
            raise CollectivesDiffer(f"all {self.world_size} ranks finished, but:\n{differ}", 0)

    def was_meant(self, reply: Reply) -> bool:
        """Whether a rank is gone, or stands still, because a fault of this group hit it."""
        return reply.kind in ("died", "hung") and any(fault.took(reply.rank) for fault in self.faults)

    def close(self) -> None:
        """End the workers and everything they started."""
        self.crew.close()

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], patient: bool
    ) -> tuple[list[Reply], str | None]:
        import cloudpickle  # type: ignore[import-untyped]

        try:
            call = cloudpickle.dumps((function, args, kwargs))
        except Exception as error:
            name = getattr(function, "__qualname__", repr(function))
            raise HarnessError(
                f"{name} cannot be sent to the workers: {error}; have it take paths or plain values"
            ) from error
        replies, reason = self.crew.command("function", [call] * self.world_size, self.timeout_s, patient)
        return [_with_value(reply) for reply in replies], reason

    def _outcome(self, reply: Reply) -> Outcome:
        if reply.kind == "value":
            return Outcome(reply.rank, "returned", value=reply.content["value"])
        if reply.kind == "error":
            return Outcome(reply.rank, "raised", error=_load_error(reply), text=reply.content["text"])
        if reply.kind == "died":
            return Outcome(reply.rank, "died", text=narrative.how_it_ended(reply))
        history = self.crew.histories()[reply.rank]
        return Outcome(reply.rank, "hung", text=narrative.where_it_is(reply, history))


@contextlib.contextmanager
def workers(
    world_size: int,
    *,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    process_group: bool = True,
    hosts: int | Cluster | None = None,
    faults: Sequence[Fault] = (),
    check_collectives: bool = True,
) -> Iterator[Group]:
    """Warm workers with a fresh gloo group and a fresh store; gone, with all they started, when the block ends.

    Args:
        world_size: how many processes.
        timeout_s: how long each `run` may take; by default 60 s, or $DISTTRAIN_TEST_TIMEOUT_S on a slow machine.
        env: variables on top of this process's environment. RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
            and MASTER_PORT are set in each worker, and OMP_NUM_THREADS to 1 unless it is set here or there.
        process_group: False leaves `init_process_group` to the code under test.
        hosts: spread the workers over this many simulated machines, or over those of a `cluster`; root on Linux only.
        faults: what shall go wrong, and when (see `disttrain.testing.faults`).
        check_collectives: fail when all ranks return but have not called the same collectives with the same shapes.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        HarnessError: workers cannot be had here; the message says why.
    """
    timeout_s = default_timeout_s() if timeout_s is None else timeout_s
    options = Options(world_size, timeout_s, process_group, hosts, env, faults, check_collectives)
    with ExitStack() as stack:
        cluster = stack.enter_context(_cluster(hosts))
        yield start_group(stack, options, cluster, [(1, 2)] * world_size)


def run_workers(
    function: Callable[..., Any],
    world_size: int,
    timeout_s: float | None = None,
    args: Sequence[Any] = (),
    *,
    env: Mapping[str, str] | None = None,
    process_group: bool = True,
    hosts: int | Cluster | None = None,
    faults: Sequence[Fault] = (),
    check_collectives: bool = True,
) -> list[Any]:
    """Call `function(*args)` in each of `world_size` fresh workers and return the values by rank.

    One `workers(...)` block with one `run`: see there for the arguments, and `Group.run` for what it raises.
    """
    __tracebackhide__ = True
    with workers(
        world_size,
        timeout_s=timeout_s,
        env=env,
        process_group=process_group,
        hosts=hosts,
        faults=faults,
        check_collectives=check_collectives,
    ) as group:
        return group.run(function, *args)


def start_group(
    stack: ExitStack,
    options: Options,
    cluster: Cluster | None,
    outputs: Sequence[tuple[int, int]],
    preload: Preload | None = None,
) -> Group:
    """Start the workers of a group, to be ended by `stack`. Rank r writes to the file descriptors `outputs[r]`."""
    from disttrain.testing.faults import armed  # imported only where it is used

    world_size, faults = options.world_size, options.faults
    env = {**(options.env or {}), **(stack.enter_context(armed(*faults)) if faults else {})}
    preload = preload or PROVIDERS.current()
    server, preloaded = default_pool().server(preload)
    local_size = world_size // (len(cluster) if cluster is not None else 1)
    listen = listening_socket() if options.process_group and cluster is None else None
    if cluster is not None:
        port = _STORE_PORT
    else:
        port = listen.getsockname()[1] if listen else stack.enter_context(reserved_port())
    address = cluster[0].address if cluster is not None else "127.0.0.1"
    specs = [
        WorkerSpec(
            rank=rank,
            world_size=world_size,
            env=environment(rank, world_size, local_size, address, port, cluster, env),
            cwd=os.getcwd(),
            sys_path=list(sys.path),
            timeout_s=options.timeout_s,
            process_group=options.process_group,
            host=cluster[rank // local_size].parts if cluster is not None else None,
            preload=None if preloaded else preload,
        )
        for rank in range(world_size)
    ]
    try:
        crew = Crew(server, specs, outputs, listen.fileno() if listen else None)
    finally:
        if listen is not None:
            listen.close()
    stack.callback(lambda: default_pool().learn(crew.late_imports))
    stack.callback(crew.close)
    return Group(crew, options.timeout_s, options.check_collectives, faults)


@contextlib.contextmanager
def _cluster(hosts: int | Cluster | None) -> Iterator[Cluster | None]:
    if hosts is None or not isinstance(hosts, int):
        yield hosts
        return
    from disttrain.testing.hosts import cluster

    with cluster(hosts) as made:
        yield made


def _describe(reply: Reply) -> str:
    if reply.kind == "error":
        return f"raised {reply.content['brief']}\n{reply.content['text'].rstrip()}"
    return narrative.how_it_ended(reply)


def _load(pickled: bytes) -> Any:
    import cloudpickle

    return cloudpickle.loads(pickled)


def _with_value(reply: Reply) -> Reply:
    """The reply with its value unpickled; a value that cannot be is a failure of its rank."""
    if reply.kind != "value":
        return reply
    try:
        return replace(reply, content={**reply.content, "value": _load(reply.content["value"])})
    except Exception as error:
        brief = (
            f"TypeError: the function returned a {reply.content['type']}, which could be pickled but not unpickled: "
            f"{type(error).__name__}: {error}; have it return plain values"
        )
        text = "".join(traceback.format_exception(error))
        return replace(reply, kind="error", content={"brief": brief, "text": text, "error": error})


def _load_error(reply: Reply) -> BaseException | None:
    error = reply.content["error"]
    if error is None or isinstance(error, BaseException):
        return error
    try:
        error = _load(error)
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None
