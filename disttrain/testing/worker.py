"""What a worker does from the moment it is forked: take its rank, join the group, carry out commands, and exit."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from disttrain.testing import processes, stacks
from disttrain.testing.loading import load
from disttrain.testing.measuring import Measuring
from disttrain.testing.spec import LATE_IMPORTS, WorkerSpec
from disttrain.testing.wire import Channel

# Longer than our own timeout, which ends the test with a diagnosis before gloo gives up.
_GROUP_SLACK_S = 60.0
_SEED = 0  # every test starts from the same random numbers, on every rank


def warm_up() -> None:
    """Do in the fork server what every worker would do on its way."""
    import cloudpickle  # type: ignore[import-untyped]  # noqa: F401
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    from disttrain import faultpoints  # noqa: F401

    torch.manual_seed(_SEED)  # accelerators' generators too, once they wake up in a worker

    # torch looks for the backend among the entry points of every installed package: 8 ms that each worker would spend.
    register: Callable[[str], None] | None = getattr(c10d.Backend, "_ensure_backend_registered", None)
    if register is not None and dist.is_gloo_available():
        register("gloo")


class Orders:
    """The test process's commands to a worker, one at a time, each of which is answered."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._measuring = Measuring()
        self._command = ""

    def receive(self) -> tuple[str, Any]:
        """The next command and its argument. Raises EOFError when the test process has hung up."""
        (self._command, argument, wanted), _ = self._channel.receive()
        self._measuring.follow(wanted)
        return self._command, argument

    def answer(self, reply: dict[str, Any]) -> None:
        """Answer the last command."""
        late_imports = [name for name in LATE_IMPORTS if name in sys.modules]
        measured = self._measuring.take() if self._command in ("function", "teardown") else None
        self._channel.send(reply | {"late_imports": late_imports, "measured": measured})


def work(spec: WorkerSpec, fds: list[int], session: Any) -> NoReturn:
    """Serve the test process until it hangs up. `fds`: channel, stdout, stderr, trace, stacks, store."""
    status = 1
    try:
        channel = Channel.from_fd(fds[0])
        _isolate(spec, fds, channel)
        _serve(spec, channel, fds, session)
        status = 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # the fork server's own exit handlers are none of our business


def _isolate(spec: WorkerSpec, fds: list[int], channel: Channel) -> None:
    """Cut the ties to the fork server, and be a process as a launcher would have started it."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    processes.adopt_orphans()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, fd in ((1, fds[1]), (2, fds[2])):
        os.dup2(fd, number)
        os.close(fd)
    # Flushed line by line, so that what a worker printed is there when it is killed.
    system: Any = sys
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(system, name, stream)
        setattr(system, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(spec.env)
    os.chdir(spec.cwd)
    sys.path[:] = spec.sys_path + [path for path in sys.path if path not in spec.sys_path]
    faulthandler.enable(file=fds[4], all_threads=True)
    faulthandler.register(processes.STACKS_SIGNAL, file=fds[4], all_threads=True)
    os.register_at_fork(after_in_child=channel.close)  # a child must not keep our line open after we died
    if spec.host is not None:
        processes.move_to_host(*spec.host)


def _serve(spec: WorkerSpec, channel: Channel, fds: list[int], session: Any) -> None:
    store: Any = None  # must live as long as the worker: rank 0's is the server
    try:
        if spec.preload is not None:
            session = load(spec.preload)
            os.environ.clear()
            os.environ.update(spec.env)
            os.chdir(spec.cwd)
        store = _join(spec, fds)
        broken = None
    except Exception as error:
        broken = failure(error)
    orders = Orders(channel)
    with contextlib.suppress(EOFError):
        while True:
            command, argument = orders.receive()
            if broken is not None:
                orders.answer(broken)
            elif command == "function":
                orders.answer(_call(argument))
            else:
                from disttrain.testing.worker_pytest import ItemRunner

                orders.answer(ItemRunner(session, spec, orders).run(argument))
    del store


def _join(spec: WorkerSpec, fds: list[int]) -> Any:
    """Threads, random numbers, faults, and the process group."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    from disttrain import faultpoints
    from disttrain.testing import trace

    torch.set_num_threads(int(spec.env.get("OMP_NUM_THREADS", "1").split(",")[0]))
    random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(_SEED)
    trace.RECORDER.start(fds[3])
    faultpoints.arm(spec.env.get(faultpoints.VARIABLE, ""), rank=spec.rank)
    if not spec.process_group:
        return None
    timeout = timedelta(seconds=spec.timeout_s + _GROUP_SLACK_S)
    store = TCPStore(
        spec.env["MASTER_ADDR"],
        int(spec.env["MASTER_PORT"]),
        spec.world_size,
        is_master=spec.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=fds[5] if len(fds) > 5 else None,
    )
    prefixed = PrefixStore("disttrain-testing", store)
    dist.init_process_group("gloo", store=prefixed, rank=spec.rank, world_size=spec.world_size, timeout=timeout)
    return store


def _call(pickled: bytes) -> dict[str, Any]:
    import cloudpickle

    try:
        function, args, kwargs = cloudpickle.loads(pickled)
        value = function(*args, **kwargs)
    except BaseException as error:
        return failure(error)
    try:
        return {"kind": "value", "value": cloudpickle.dumps(value), "type": type(value).__name__}
    except Exception as error:
        return failure(TypeError(f"the function returned a {type(value).__name__}, which cannot be sent back: {error}"))


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as the test process can read it, even if it cannot be pickled."""
    import cloudpickle

    trimmed = error.__traceback__
    while trimmed is not None and stacks.is_machinery(trimmed.tb_frame.f_code.co_filename):
        trimmed = trimmed.tb_next  # start where the user's code starts
    text = "".join(traceback.format_exception(type(error), error, trimmed or error.__traceback__))
    try:
        pickled = cloudpickle.dumps(error.with_traceback(None))
    except Exception:
        pickled = None
    return {"kind": "error", "text": text, "error": pickled, "brief": f"{type(error).__name__}: {error}"}
