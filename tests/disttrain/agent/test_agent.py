"""A node's agent, with stand-ins for its workers: what becomes of requests to stop, and of a run that is finished."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from disttrain.agent import __main__ as program
from disttrain.agent import elastic
from disttrain.distributed.ports import reserved_port
from disttrain.recipe import load_recipe, to_toml
from disttrain.testing import run_workers

# Each is ready, and then does what the line after it says. As a real worker, it takes a second request for impatience.
_WORKER = """
import json, os, signal, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[1])
requests = []
def asked(*_):
    requests.append(time.monotonic())
    (folder / f"asked-{rank}").touch()
signal.signal(signal.SIGTERM, asked)
def end(code, message):
    report = {"exit_code": code, "message": message, "time": time.time()}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
    os._exit(code)
def all_ready():
    (folder / f"ready-{rank}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.02)
"""
SAVES = """
all_ready()
while not (requests and (folder / "saved").exists()):
    time.sleep(0.02)
end(75, "saved") if len(requests) == 1 else end(130, "asked more than once")
"""
NEVER_SAVES = "all_ready()\ntime.sleep(3600)"
IS_NOT_READY_YET = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nall_ready()\ntime.sleep(3600)"
LEAVES_EARLY = """
all_ready()
os._exit(0) if rank == "1" else time.sleep(3600)
"""
FAILS_AFTER_THE_END = """
all_ready()
if rank == "1":
    with (folder / "run/journal.jsonl").open("a") as journal:
        journal.write('{"kind": "status", "status": "FINISHED"}\\n')
    end(1, "a connection was lost")
end(0, "done")
"""


def node(
    folder: Path, port: int, does: str = "", rendezvous: str = "", serves: str = "", epochs: int = 2, lr: float = 0.05
) -> str:
    """Be one of two nodes; the exit code, and what was said."""
    rank = os.environ.pop("RANK")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    elastic._TO_END_S = 1
    sys.argv = [
        "agent", "--nodes", "2", "2", "--rendezvous", rendezvous or f"127.0.0.1:{port}", "--workers", "1",
        "--max-restarts", "0", "--job-id", "job", "--serves", serves or str(rank == "0").lower(),
        "--local-addr", "127.0.0.1", "--stop-grace", "600", "--run-dir", str(folder / "run"), "--recipe", "digits",
        f"--override=train.epochs={epochs}", f"--override=optim.lr={lr}", "--", "-c", _WORKER + does, str(folder),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        code = program.main()
        said.seek(0)
        return f"{code}: {said.read().decode()}"


def two_nodes(folder: Path, does: str, requests: Sequence[signal.Signals] = ()) -> list[str]:
    """Two nodes, both of which are sent these signals once their workers are ready, the first of them until it is heard
    of by their workers. What is asked more than a second later counts as another request."""

    def ask(rank: str, ended: threading.Event) -> None:
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), requests[0])
        while len(requests) > 1 and len(list(folder.glob("asked-*"))) < 2:
            time.sleep(0.02)
        for number in requests[1:]:
            if ended.wait(1.2):
                return
            os.kill(os.getpid(), number)
        (folder / f"said-{rank}").touch()
        if len(list(folder.glob("said-*"))) == 2:
            (folder / "saved").touch()

    def work(port: int) -> str:
        ended = threading.Event()
        if requests:
            threading.Thread(target=ask, args=(os.environ["RANK"], ended), daemon=True).start()
        try:
            return node(folder, port, does)
        finally:
            ended.set()

    with reserved_port() as port:
        return run_workers(work, 2, args=(port,), process_group=False, timeout_s=240)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two epochs that has begun."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.toml").write_text(to_toml(load_recipe("digits", ["train.epochs=2"])))
    (path / "journal.jsonl").write_text('{"kind": "journal"}\n{"kind": "status", "status": "RUNNING"}\n')
    return path


def test_nodes_that_are_stopped_at_once_leave_their_workers_the_time_to_save(tmp_path: Path) -> None:
    """However often it is said: whoever stops a pod may do so several times while it saves."""
    folder = tmp_path / "a $$b"  # which torchrun's templates must leave alone
    folder.mkdir()
    said = two_nodes(folder, SAVES, [signal.SIGTERM] * 3)
    for words in said:
        assert words.startswith("75: disttrain: SIGTERM: asking the workers to save and stop"), said
        assert words.endswith("\ndisttrain: saved\n")


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    for words in two_nodes(tmp_path, NEVER_SAVES, [signal.SIGINT] * 2):
        assert words.startswith(
            "1: disttrain: Ctrl-C: asking the workers to save and stop; press Ctrl-C again to kill them"
        )
        assert words.endswith("ended without a save: the workers were killed on request\n")


def test_workers_that_are_not_ready_have_nothing_to_save(tmp_path: Path) -> None:
    for words in two_nodes(tmp_path, IS_NOT_READY_YET, [signal.SIGTERM]):
        assert words.startswith("75: ")
        assert "stopped before the workers were ready" in words


def test_a_worker_that_fails_after_the_end_of_the_run_is_not_waited_for(tmp_path: Path, run_dir: Path) -> None:
    assert two_nodes(tmp_path, FAILS_AFTER_THE_END) == ["0: ", "0: "]


def test_a_worker_that_leaves_with_0_before_it_has_finished_has_failed(tmp_path: Path) -> None:
    """And those of the other node do not wait for it."""
    message = "rank 1 on .* exited with code 0 before its work was done: .* called os._exit\\(0\\)\n"
    for words in two_nodes(tmp_path, LEAVES_EARLY):
        assert re.fullmatch(f"1: disttrain: {message}", words), words


def test_a_node_that_comes_after_the_end_is_done(tmp_path: Path, run_dir: Path) -> None:
    """The name of the node that served the rendezvous may be gone with it."""

    def late(epochs: int, lr: float = 0.05) -> str:
        return node(tmp_path, 1, rendezvous="gone.invalid:1", serves="unknown", epochs=epochs, lr=lr)

    (running,) = run_workers(lambda: late(2), 1, process_group=False)
    assert running.startswith("1: disttrain: --rendezvous gone.invalid:1: the name 'gone.invalid' does not resolve")
    with (run_dir / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "status", "status": "FINISHED"}\n{"kind": "event", "name": "status"}\n')
    (finished,) = run_workers(lambda: late(2), 1, process_group=False)
    assert finished == f"0: disttrain: {run_dir} is already finished: there is nothing left to do\n"
    (longer,) = run_workers(lambda: late(3), 1, process_group=False)
    assert longer.startswith("1: ")
    (another,) = run_workers(lambda: late(2, 0.5), 1, process_group=False)
    assert another.startswith(f"78: disttrain: {run_dir} holds a run of another recipe: optim.lr was 0.05, now 0.5.")


def test_so_is_one_of_a_run_behind_a_url(tmp_path: Path, run_dir: Path) -> None:
    from disttrain.agent.finished import is_finished

    url = f"file://{run_dir}"
    assert not is_finished(url, "digits", ["train.epochs=2"])
    with (run_dir / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "status", "status": "FINISHED"}\n')
    assert is_finished(url, "digits", ["train.epochs=2"])
    assert not is_finished(url, "digits", ["train.epochs=2", "train.max_steps=7"])
    assert not is_finished(f"{url}-nowhere", "digits", ["train.epochs=2"])
