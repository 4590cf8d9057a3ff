"""The local launcher: workers start together, end together, and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from disttrain.distributed.launched import slot_in
from disttrain.distributed.lease import HeldLease
from disttrain.distributed.ports import reserved_port
from disttrain.layout import LEASE, NODE_SLOT
from disttrain_launch.local import worker, workers
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.watch import Watch
from tests.launch.conftest import Launcher, StartLauncher

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped worker ends when it is continued")

# A worker as the real ones are: asked to stop, it ends with 75 when it has saved.
STOPPABLE = """
requests = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: requests.append(number))
here("ready")
while not requests:
    time.sleep(0.01)
time.sleep(0.3)  # saving
Path(f"requests-{rank}").write_text(json.dumps(requests))
os._exit(75)
"""


def test_a_system_that_forbids_files_in_memory_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> int:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(os, "memfd_create", forbidden, raising=False)
    with worker._memory_file() as file:
        file.write(b"{}")


def test_a_run_that_a_worker_of_several_machines_starts_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASE, "1000")  # a descriptor, which is not inherited
    monkeypatch.setenv(NODE_SLOT, "1 2")
    environment = WorkerGroup((), 2).environment(0, 29500)
    assert HeldLease.of_this_process(environment) is None
    assert slot_in(environment) == (None, 0)


def test_workers_get_the_contract(start_launcher: StartLauncher) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DISTTRAIN_LAUNCHER"]
    launcher = start_launcher(f"Path(f'env-{{rank}}').write_text(json.dumps({{n: os.environ[n] for n in {names}}}))", 3)
    assert launcher.end() == (0, "", "")
    found = [json.loads((launcher.folder / f"env-{rank}").read_text()) for rank in range(3)]
    port = found[0]["MASTER_PORT"]
    assert 1024 < int(port) < 65536
    for rank, environment in enumerate(found):
        assert environment == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DISTTRAIN_LAUNCHER": "disttrain",
        }


def test_only_rank_0_speaks_and_the_others_are_in_their_logs(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("print('out', rank); print('err', rank, file=sys.stderr)", 2)
    assert launcher.end() == (0, "out 0\n", "err 0\n")
    assert (launcher.folder / "logs/worker-1.log").read_text() == "out 1\nerr 1\n"
    assert os.listdir(launcher.folder / "logs") == ["worker-1.log"]


def test_logs_of_an_earlier_start_are_kept(start_launcher: StartLauncher, tmp_path: Path) -> None:
    launcher = start_launcher("wait_for('go'); print('second start')", 2)
    (tmp_path / "logs/worker-1.log").write_text("first start\n")
    (tmp_path / "go").touch()
    launcher.end()
    assert (tmp_path / "logs/worker-1.log").read_text() == "first start\nsecond start\n"


@pytest.mark.parametrize("code", [1, 2, 70, 78])
def test_the_failing_workers_message_and_code_are_passed_on(start_launcher: StartLauncher, code: int) -> None:
    launcher = start_launcher(f"report('no good', {code}) if rank == 1 else time.sleep(600)", 2, to_report_s=0.1)
    assert launcher.end() == (code, "", "disttrain: rank 1 on box: no good\n")


def test_what_stopped_workers_say_is_said_once(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("report('stopped at step 7', 75)", 2)
    assert launcher.end() == (75, "", "disttrain: stopped at step 7\n")


def test_what_all_ranks_say_is_said_once_without_a_rank(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("time.sleep(0.3 * rank); report('data.root: no such folder', 78)", 3)
    assert launcher.end() == (78, "", "disttrain: data.root: no such folder\n")


def test_the_earliest_failure_is_the_cause(start_launcher: StartLauncher) -> None:
    code = "report('first', 1, at=1000.0) if rank == 1 else report('connection closed by peer', 1, at=1001.0)"
    returncode, _, err = start_launcher(f"here('up'); wait_for('up-0'); wait_for('up-1'); {code}", 2).end()
    assert (returncode, err) == (1, "disttrain: rank 1 on box: first\n")


def test_an_explained_failure_is_no_consequence(start_launcher: StartLauncher) -> None:
    code = "report('lost rank 1', 1, at=1000.0) if rank == 0 else report('loss is NaN', 70, at=1001.0)"
    returncode, _, err = start_launcher(f"here('up'); wait_for('up-0'); wait_for('up-1'); {code}", 2).end()
    assert (returncode, err) == (70, "disttrain: rank 1 on box: loss is NaN\n")


def test_an_unexpected_failure_comes_with_its_traceback(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("report('ValueError: x', 1, traceback='Traceback: here\\n')", 1)
    assert launcher.end() == (1, "", "Traceback: here\ndisttrain: ValueError: x\n")


def test_a_killed_worker_is_named_and_ends_the_job(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(
        """
        Path(f"pid-{rank}").write_text(str(os.getpid()))
        here("up")
        if rank == 0:  # what gloo does when a peer is gone
            wait_for("gone")
            report("connection closed by peer", 1, at=time.time() - 5)
        time.sleep(600)
        """,
        2,
    )
    launcher.wait_for("up-0", "up-1")
    (launcher.folder / "gone").touch()
    os.kill(int((launcher.folder / "pid-1").read_text()), signal.SIGKILL)
    returncode, _, err = launcher.end()
    assert returncode == 1
    assert err.startswith(f"disttrain: rank 1 on {socket.gethostname()} was killed by SIGKILL (usually because")
    assert err.endswith(f"; see {launcher.folder}/logs/worker-1.log\n")


def test_a_segmentation_fault_leaves_its_stack_in_the_log(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("import ctypes\nctypes.string_at(0) if rank == 1 else time.sleep(600)", 2)
    returncode, _, err = launcher.end()
    assert returncode == 1
    assert "was killed by SIGSEGV; see" in err
    assert "string_at" in (launcher.folder / "logs/worker-1.log").read_text()


def test_a_silent_exit_is_shown_with_its_last_words(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("sys.exit('ImportError: no torch') if rank == 1 else time.sleep(600)", 2, logs=False)
    host = socket.gethostname()
    assert launcher.end() == (
        1,
        "",
        f"disttrain: rank 1 on {host} exited with code 1 without giving a reason; its last words:\n"
        "disttrain: ImportError: no torch\n",
    )


def test_a_worker_that_leaves_with_0_before_it_has_finished_has_failed(start_launcher: StartLauncher) -> None:
    """And the others do not wait for it."""
    launcher = start_launcher("os._exit(0) if rank == 1 else time.sleep(600)", 2, to_report_s=0.1)
    assert launcher.end() == (
        1,
        "",
        f"disttrain: rank 1 on {socket.gethostname()}: exited with code 0 before its work was done: code that it "
        "runs called os._exit(0)\n",
    )


def test_a_worker_that_ignores_sigterm_is_killed_when_another_fails(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(
        """
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            here("deaf")
            time.sleep(600)
        wait_for("deaf-0")
        report("no good", 1)
        """,
        2,
        grace_s=0.5,
        to_report_s=0.1,
    )
    launcher.wait_for("deaf-0")
    began = time.monotonic()
    assert launcher.end() == (1, "", "disttrain: rank 1 on box: no good\n")
    assert 0.4 < time.monotonic() - began < 500


def test_the_children_of_a_killed_worker_die_with_it(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(
        """
        import subprocess
        subprocess.Popen(["sleep", "60"])
        here("up")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        1,
    )
    returncode, _, err = launcher.end()  # which looks for processes
    assert returncode == 1
    assert err.startswith("disttrain: the worker was killed by SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_request_to_stop_reaches_each_worker_once(start_launcher: StartLauncher, number: signal.Signals) -> None:
    launcher = start_launcher(STOPPABLE, 2)
    launcher.wait_for("ready-0", "ready-1")
    launcher.send(number)
    returncode, _, err = launcher.end()
    assert returncode == 75
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert err == f"disttrain: {name}: asking the workers to save and stop; press Ctrl-C again to kill them\n"
    for rank in range(2):
        assert json.loads((launcher.folder / f"requests-{rank}").read_text()) == [signal.SIGTERM]


def test_a_signal_that_arrives_twice_at_once_is_one_request(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(STOPPABLE, 2)
    launcher.wait_for("ready-0", "ready-1")
    launcher.send(signal.SIGTERM)  # as from `timeout`, which tells its child and then its whole group
    time.sleep(0.1)
    launcher.send(signal.SIGTERM)
    assert launcher.end()[0] == 75


def test_a_terminal_that_closes_is_a_request_though_nothing_can_be_said_to_it(start_launcher: StartLauncher) -> None:
    """It may send more than one SIGHUP: that is still no "at once"."""
    launcher = start_launcher(STOPPABLE.replace("time.sleep(0.3)", "wait_for('go')"), 2)
    launcher.wait_for("ready-0", "ready-1")
    assert launcher.process.stderr is not None
    launcher.process.stderr.close()
    launcher.send(signal.SIGHUP)
    time.sleep(1.2)
    launcher.send(signal.SIGHUP)
    time.sleep(0.1)
    (launcher.folder / "go").touch()
    assert launcher.end()[0] == 75


def test_a_killed_worker_that_had_the_console_is_known_also_when_none_is_left() -> None:
    """Its progress bar has hidden the terminal's cursor, which is shown again."""
    group = WorkerGroup(("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 1)
    with (
        workers.signals_heard() as signals,
        reserved_port() as port,
        workers._started(group, port) as (started, replace),
    ):
        watch = Watch(group, started, signals, replace, port)
        watch.until_the_end()
    assert watch.has_lost_the_console


def test_a_second_request_kills(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("signal.signal(signal.SIGTERM, signal.SIG_IGN); here('deaf'); time.sleep(600)", 2)
    launcher.wait_for("deaf-0", "deaf-1")
    launcher.send(signal.SIGINT)
    time.sleep(1.1)
    launcher.send(signal.SIGINT)
    returncode, _, err = launcher.end()
    assert returncode == 130
    assert err.endswith("disttrain: killed on request\n")


def test_stopped_before_the_workers_listen(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("here('up'); time.sleep(600)", 2)
    launcher.wait_for("up-0", "up-1")
    launcher.send(signal.SIGTERM)
    returncode, _, err = launcher.end()
    assert returncode == 75
    assert err.endswith("disttrain: stopped before the workers were ready; run the same command again\n")


def test_a_request_that_comes_when_all_is_done_changes_nothing(start_launcher: StartLauncher) -> None:
    """Not "stopped before the workers were ready": what they had to do is done."""
    code = """
    from disttrain.health.stop import ending_undisturbed
    with ending_undisturbed():
        pass
    here("done")
    wait_for("go")
    """
    launcher = start_launcher(code, 1)
    launcher.wait_for("done-0")
    launcher.send(signal.SIGINT)
    assert launcher.process.stderr is not None
    assert "to save and stop" in launcher.process.stderr.readline()  # so the worker was sent its SIGTERM, or is
    time.sleep(0.1)
    (launcher.folder / "go").touch()
    assert launcher.end() == (0, "", "")


def test_a_worker_may_take_its_time_to_save(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("os._exit(75) if rank == 1 else (time.sleep(1), os._exit(75))", 2, grace_s=0.1)
    assert launcher.end() == (75, "", "")


def ignoring(number: signal.Signals) -> tuple[str, ...]:
    """Start the launcher as a shell does that has it ignore a signal."""
    code = f"import os, signal, sys; signal.signal({number:d}, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    return (sys.executable, "-c", code)


def test_nohup_keeps_it_running(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("here('up'); wait_for('go')", 1, prefix=ignoring(signal.SIGHUP))
    launcher.wait_for("up-0")
    launcher.send(signal.SIGHUP)
    time.sleep(0.3)
    (launcher.folder / "go").touch()
    assert launcher.end() == (0, "", "")


def test_a_background_job_can_be_interrupted(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(STOPPABLE, 1, prefix=ignoring(signal.SIGINT))
    launcher.wait_for("ready-0")
    launcher.send(signal.SIGINT)
    assert launcher.end()[0] == 75


def test_a_killed_launcher_takes_its_workers_along(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(STOPPABLE, 3)
    launcher.wait_for("ready-0", "ready-1", "ready-2")
    assert len(launcher.processes()) == 3
    launcher.send(signal.SIGKILL)
    launcher.process.wait()
    launcher.assert_nothing_left()


def suspend(launcher: Launcher, rank: int) -> int:
    """Stop a worker as SIGSTOP does, and wait until it has stopped; its process id."""
    pid = int((launcher.folder / f"pid-{rank}").read_text())
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 240
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pid


# Nothing of it depends on what the worker does: it has not even imported torch.
KNOWN = "Path(f'pid-{rank}').write_text(str(os.getpid()))" + STOPPABLE


@only_linux
@pytest.mark.parametrize("size", [1, 2])
def test_a_stopped_worker_is_named_once_whatever_it_was_doing(start_launcher: StartLauncher, size: int) -> None:
    launcher = start_launcher(KNOWN, size)
    launcher.wait_for(*(f"ready-{rank}" for rank in range(size)))
    pid = suspend(launcher, size - 1)
    assert launcher.process.stderr is not None
    assert launcher.process.stderr.readline() == (
        f"disttrain: rank {size - 1} (process {pid}) is stopped (SIGSTOP) and the job waits for it; "
        f"resume it with: kill -CONT {pid}\n"
    )
    launcher.send(signal.SIGTERM)  # it saves all the same
    returncode, _, err = launcher.end()
    assert returncode == 75
    assert "stopped (SIGSTOP)" not in err
    assert json.loads((launcher.folder / f"requests-{size - 1}").read_text()) == [signal.SIGTERM]


@only_linux
def test_a_killed_launcher_takes_stopped_workers_along(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(KNOWN, 2)
    launcher.wait_for("ready-0", "ready-1")
    suspend(launcher, 0)
    suspend(launcher, 1)
    launcher.send(signal.SIGKILL)
    launcher.process.wait()
    launcher.assert_nothing_left()


def test_more_workers_than_cores(start_launcher: StartLauncher) -> None:
    assert start_launcher("pass", 12).end() == (0, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is found, not kept")
def test_the_port_is_kept_for_rank_0() -> None:
    with reserved_port() as port, socket.socket() as thief, socket.socket() as rank_0:
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
        rank_0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank_0.bind(("127.0.0.1", port))
        rank_0.listen()
