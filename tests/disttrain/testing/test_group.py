"""`run_workers` and `workers` from Python: values by rank, failures with their rank, and nothing left behind."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from typing import Any

import pytest
import torch
import torch.distributed as dist

from disttrain.testing import CollectivesDiffer, HarnessError, WorkerFailed, WorkerTimeout, faults, run_workers, workers
from disttrain.testing.options import Options
from tests.disttrain.testing.left_behind import marked_processes, shared_memory_of


def sum_of_ranks(offset: int) -> list[float]:
    tensor = torch.full((2,), float(dist.get_rank() + offset))
    dist.all_reduce(tensor)
    return tensor.tolist()


def test_values_come_back_by_rank() -> None:
    assert run_workers(lambda: dist.get_rank(), 3) == [0, 1, 2]
    assert run_workers(sum_of_ranks, 2, args=(10,)) == [[21.0, 21.0], [21.0, 21.0]]


def test_tensors_come_back() -> None:
    values = run_workers(lambda: torch.arange(3) + dist.get_rank(), 2)
    assert [value.tolist() for value in values] == [[0, 1, 2], [1, 2, 3]]


def test_workers_stay_for_several_runs() -> None:
    with workers(2) as group:
        pids = group.run(os.getpid)
        assert pids == group.pids
        assert group.run(os.getpid) == pids
        assert group.run(sum_of_ranks, offset=1) == [[3.0, 3.0]] * 2


def test_the_environment_is_a_launchers() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MINE")
    values = run_workers(lambda: [os.environ[name] for name in names], 2, env={"MINE": "x"})
    assert values == [[str(rank), str(rank), "2", "2", "127.0.0.1", "1", "x"] for rank in range(2)]


def test_the_code_under_test_may_set_up_its_own_group() -> None:
    def body() -> int:
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        size = dist.get_world_size()
        dist.destroy_process_group()
        return size

    assert run_workers(body, 2, process_group=False) == [2, 2]


def test_a_group_can_be_taken_down_and_set_up_again() -> None:
    def body() -> list[float]:
        dist.destroy_process_group()
        dist.init_process_group("gloo")
        return sum_of_ranks(0)

    assert run_workers(body, 2) == [[1.0, 1.0]] * 2


def fail_in_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second rank does not like this")
    dist.barrier()


def test_the_failing_ranks_error_is_raised() -> None:
    with pytest.raises(WorkerFailed) as caught:
        run_workers(fail_in_rank_one, 2)
    assert caught.value.rank == 1
    assert isinstance(caught.value.cause, ValueError)
    message = str(caught.value)
    assert "rank 1 of 2 raised ValueError: the second rank does not like this" in message
    assert "in fail_in_rank_one" in message
    assert "rank 0 was in barrier()" in message


def test_the_cause_comes_before_its_consequences() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            os._exit(3)
        dist.barrier()

    with pytest.raises(WorkerFailed) as caught:
        run_workers(body, 2)
    assert caught.value.rank == 0
    assert str(caught.value).startswith("rank 0 of 2 exited with code 3 before it was done")
    assert "rank 1 lost its connection" in str(caught.value)


def test_both_failures_are_shown() -> None:
    def body() -> None:
        raise RuntimeError(f"trouble {dist.get_rank()}")

    with pytest.raises(WorkerFailed, match=r"(?s)trouble \d.*trouble \d"):
        run_workers(body, 2)


def test_a_crash_names_its_signal_and_place() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            ctypes.string_at(0)

    with pytest.raises(WorkerFailed, match=r"(?s)rank 0 of 2 was killed by SIGSEGV.*ctypes.string_at\(0\)"):
        run_workers(body, 2)


def test_a_hang_shows_every_ranks_stack() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(2, 3))
        time.sleep(30)

    with pytest.raises(WorkerTimeout) as caught:
        run_workers(body, 2, timeout_s=1.5)
    message = str(caught.value)
    assert "not done after 1.5 s" in message
    assert "rank 0 was in all_reduce(float32 [2, 3], op=SUM)" in message
    assert "dist.all_reduce(torch.ones(2, 3))" in message
    assert "rank 1 was still running" in message
    assert "time.sleep(30)" in message


def test_a_hang_in_c_that_holds_the_interpreter_is_shown_too() -> None:
    def body() -> None:
        ctypes.PyDLL(None).sleep(30)  # PyDLL does not let go of the interpreter's lock

    with pytest.raises(WorkerTimeout, match=r"ctypes.PyDLL\(None\).sleep\(30\)"):
        run_workers(body, 1, timeout_s=1)


def test_waiting_for_a_rank_that_is_done_is_noticed_before_the_timeout() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            dist.barrier()

    start = time.monotonic()
    with pytest.raises(WorkerTimeout, match="stuck in a collective that a rank which is done never called"):
        run_workers(body, 2, timeout_s=200)
    assert time.monotonic() - start < 150


def test_a_stopped_rank_is_called_that() -> None:
    def body() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), 19)
        dist.barrier()

    with pytest.raises(WorkerTimeout, match=r"rank 1 is stopped by a signal \(SIGSTOP\)"):
        run_workers(body, 2, timeout_s=1.5)


def test_different_shapes_name_both_call_sites() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            dist.broadcast(torch.ones(3), src=0)
        else:
            dist.broadcast(torch.ones(2, 2), src=0)

    with pytest.raises(WorkerFailed) as caught:
        run_workers(body, 2, timeout_s=120)
    message = str(caught.value)
    assert "rank 0 called broadcast(float32 [3], src=0)" in message
    assert "dist.broadcast(torch.ones(3), src=0)" in message
    assert "rank 1 called broadcast(float32 [2, 2], src=0)" in message
    assert "dist.broadcast(torch.ones(2, 2), src=0)" in message


def one_sided() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1), async_op=True)  # and nobody waits for it


def test_a_collective_that_some_ranks_skip_is_a_failure_even_if_nobody_waits() -> None:
    with pytest.raises(CollectivesDiffer, match=r"(?s)rank 0 called all_reduce.*rank 1 did not"):
        run_workers(one_sided, 2)
    run_workers(one_sided, 2, check_collectives=False)


def test_shapes_of_the_same_size_that_gloo_takes_for_equal_are_a_failure() -> None:
    def body() -> None:
        dist.all_reduce(torch.ones(2, 3) if dist.get_rank() == 0 else torch.ones(3, 2))

    with pytest.raises(CollectivesDiffer, match=r"(?s)float32 \[2, 3\].*float32 \[3, 2\]"):
        run_workers(body, 2)


def test_subgroups_are_compared_among_their_members() -> None:
    def body() -> None:
        pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
        for number, pair in enumerate(pairs):
            if dist.get_rank() in (number, number + 1):
                dist.all_reduce(torch.ones(number + 1), group=pair)

    run_workers(body, 3)


def test_nothing_of_one_run_is_seen_by_the_next() -> None:
    def poison() -> None:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(99)
        random.seed(99)
        torch.set_num_threads(2)
        os.environ["POISON"] = "1"
        os.chdir("/")
        torch.use_deterministic_algorithms(True)

    def look() -> tuple[object, ...]:
        state = torch.get_rng_state().sum().item(), random.random()
        return torch.get_default_dtype(), state, torch.get_num_threads(), "POISON" in os.environ, os.getcwd()

    before = run_workers(look, 2)
    run_workers(poison, 2)
    assert run_workers(look, 2) == before
    assert before[0] == before[1]


def test_a_killed_worker_is_replaced() -> None:
    with pytest.raises(WorkerFailed):
        run_workers(lambda: os.kill(os.getpid(), 9), 2)
    assert run_workers(lambda: 1, 2) == [1, 1]


def test_a_spent_group_says_so() -> None:
    with workers(2) as group:
        with pytest.raises(WorkerFailed):
            group.run(lambda: os._exit(1))
        with pytest.raises(HarnessError, match="make a new group"):
            group.run(os.getpid)


def test_outcomes_of_every_rank() -> None:
    def body() -> int:
        rank = dist.get_rank()
        if rank == 1:
            raise KeyError("one")
        if rank == 2:
            os.kill(os.getpid(), 9)
        return rank

    with workers(3) as group:
        outcomes = group.attempt(body)
    assert [outcome.state for outcome in outcomes] == ["returned", "raised", "died"]
    assert isinstance(outcomes[1].error, KeyError)
    assert outcomes[2].text == "was killed by SIGKILL"


def test_what_cannot_be_sent_is_said() -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(HarnessError, match="cannot be sent to the workers"):
        run_workers(lambda: lock.locked(), 1)
    with pytest.raises(WorkerFailed, match="which cannot be sent back"):
        run_workers(lambda: threading.Lock(), 1)


def test_world_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        run_workers(os.getpid, 0)


def leave_children() -> list[int]:
    here = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(here, start_new_session=True)
    shell = subprocess.Popen(["sh", "-c", "setsid sleep 600 & exec sleep 600"])
    return [child.pid, shell.pid]


def test_what_a_worker_started_goes_with_it() -> None:
    mark = f"DISTTRAIN_MARK={uuid.uuid4().hex}"
    run_workers(leave_children, 2, env=dict([mark.split("=")]))
    assert marked_processes(mark) == []


def test_nothing_is_left_after_a_hang() -> None:
    mark = f"DISTTRAIN_MARK={uuid.uuid4().hex}"

    def body() -> None:
        leave_children()
        torch.ones(8).share_memory_()
        time.sleep(600)

    with workers(2, timeout_s=1.5, env=dict([mark.split("=")])) as group:
        pids = group.pids
        with pytest.raises(WorkerTimeout):
            group.run(body)
    assert marked_processes(mark) == []
    assert len(pids) == 2
    assert shared_memory_of(pids) == []


def test_a_script_needs_no_pytest(tmp_path: object) -> None:
    script = """
import sys
from disttrain.testing import run_workers
import torch.distributed as dist
FACTOR = 7
def body(): return dist.get_rank() * FACTOR
if __name__ == "__main__":
    print(run_workers(body, 2))
"""
    mark = f"DISTTRAIN_MARK={uuid.uuid4().hex}"
    path = f"{tmp_path}/script.py"
    with open(path, "w") as file:
        file.write(script)
    environment = os.environ | dict([mark.split("=")])
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert (done.stdout, done.returncode) == ("[0, 7]\n", 0), done.stderr
    assert marked_processes(mark) == []


def test_workers_go_when_the_test_process_is_killed(tmp_path: object) -> None:
    script = """
import os, time
from disttrain.testing import workers
def body(): time.sleep(600)
with workers(2) as group:
    print("up", flush=True)
    group.run(body)
"""
    mark = f"DISTTRAIN_MARK={uuid.uuid4().hex}"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | dict([mark.split("=")])) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.kill()
    deadline = time.monotonic() + 480
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_processes(mark) == []


def test_an_interrupted_request_does_not_answer_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise TimeoutError("too late")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay_s in (0.01, 0.03):
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            try:
                run_workers(time.sleep, 2, args=(30,))
            except TimeoutError:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert run_workers(dist.get_rank, 2) == [0, 1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_torch_imports_late_is_imported_once() -> None:
    def had_it_already() -> bool:
        had = "torch._dynamo" in sys.modules
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        return had

    run_workers(had_it_already, 2)
    assert run_workers(had_it_already, 2) == [True, True]


WRONG_ARGUMENTS: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"world_size": "2"}, TypeError, "world_size must be a whole number, at least 1, not '2'"),
    ({"world_size": True}, TypeError, "world_size must be a whole number, at least 1, not True"),
    ({"timeout_s": "x"}, TypeError, "timeout_s must be a number of seconds above 0, not 'x'"),
    ({"timeout_s": -1}, ValueError, "timeout_s must be a number of seconds above 0, not -1"),
    ({"timeout_s": float("inf")}, ValueError, "timeout_s must be a number of seconds above 0, not inf"),
    ({"process_group": "nccl"}, TypeError, "process_group must be True or False, not 'nccl': True is a gloo group"),
    ({"check_collectives": None}, TypeError, "check_collectives must be True or False, not None"),
    ({"hosts": 0}, ValueError, "hosts must be a whole number of machines, 1 to 254, not 0"),
    ({"hosts": "two"}, TypeError, "hosts must be a whole number of machines, 1 to 254, not 'two'"),
    ({"hosts": 3}, ValueError, "world_size 2 cannot be spread evenly over 3 hosts"),
    ({"env": {"A": 1}}, TypeError, "env must have strings as names and values, not 'A': 1; write 'A': '1'"),
    ({"env": "A=1"}, TypeError, "env must be a dict of environment variables, not 'A=1'"),
    ({"env": {"A=B": "1"}}, ValueError, "env has 'A=B': '1', which no environment can hold"),
    ({"faults": "x"}, TypeError, "faults must be a list of faults .*, not 'x'"),
    ({"faults": ["x"]}, TypeError, "faults must hold faults, such as .*, not 'x'"),
    ({"faults": faults.kill(1, step=3)}, TypeError, r"faults must be a list: faults=\[...\] around Fault"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_told_before_anything_starts(
    wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run_workers(os.getpid, **{"world_size": 2, **wrong})
    with pytest.raises(kind, match=message), workers(**{"world_size": 2, **wrong}):
        pass


def test_a_closed_group_says_so() -> None:
    with workers(1) as group:
        group.run(os.getpid)
    with pytest.raises(HarnessError, match=r"this group is closed: its `with workers\(...\)` block has ended"):
        group.run(os.getpid)


class CannotComeBack:
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("not a number",)


def test_a_value_that_cannot_be_unpickled_names_its_rank_and_type() -> None:
    def body() -> object:
        return CannotComeBack() if dist.get_rank() == 1 else 0

    with workers(2) as group:
        with pytest.raises(WorkerFailed, match=r"rank 1 of 2 .* returned a CannotComeBack, which .* not unpickled: V"):
            group.run(body)
        outcomes = group.attempt(body)
    assert [outcome.state for outcome in outcomes] == ["returned", "raised"]
    assert isinstance(outcomes[1].error, ValueError)


def test_a_slow_machine_says_how_long_workers_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTTRAIN_TEST_TIMEOUT_S", "7.5")
    assert Options().timeout_s == 7.5
    with workers(1, process_group=False) as group:
        assert group.timeout_s == 7.5
    monkeypatch.setenv("DISTTRAIN_TEST_TIMEOUT_S", "long")
    with pytest.raises(ValueError, match="DISTTRAIN_TEST_TIMEOUT_S = 'long' is not a number of seconds"):
        run_workers(print, 1)
