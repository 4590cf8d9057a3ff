"""The pytest plugin, run through pytester: what a user sees when tests in workers pass, fail, hang, crash or skip."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

# What the sessions below import has to be here before them: pytester takes it away again, which torch does not survive.
import cloudpickle  # noqa: F401
import pytest
import torch.distributed  # noqa: F401

import disttrain.testing.faults
import disttrain.testing.hosts
import disttrain.testing.item
import disttrain.testing.pool  # noqa: F401
from tests.disttrain.testing.left_behind import marked_processes

pytest_plugins = ["pytester"]

HEAD = """
import ctypes, os, time, warnings, logging
import pytest, torch
import torch.distributed as dist
"""


def run(pytester: pytest.Pytester, body: str, *options: str) -> pytest.RunResult:
    """Run these tests in this process: the warm workers are shared with the session that runs us."""
    pytester.makepyfile(HEAD + body)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def test_a_body_runs_in_every_worker(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed(world_size=3)
def test_sum(rank, world_size, tmp_path):
    tensor = torch.ones(2) * rank
    dist.all_reduce(tensor)
    assert tensor.tolist() == [3, 3]
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)
    (tmp_path / str(rank)).write_text(str(os.getpid()))
    dist.barrier()
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 3

class TestInAClass:
    @pytest.mark.distributed
    def test_method(self, rank):
        assert rank in (0, 1)
""",
    )
    result.assert_outcomes(passed=2)


def test_world_sizes_parametrize(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed(world_size=[1, 2])
@pytest.mark.parametrize("factor", [3, 5])
def test_size(factor, world_size):
    assert dist.get_world_size() == world_size
    assert factor in (3, 5)
""",
        "-v",
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*test_size?world_size=1-3? PASSED*", "*test_size?world_size=2-5? PASSED*"])


def test_one_failing_rank(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_one(rank):
    print("here is", rank)
    logging.getLogger("mine").warning("log of %s", rank)
    found = [1, 2, rank]
    if rank == 1:
        assert found == [1, 2, 0]
    dist.barrier()
""",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 2",
            ">           assert found == [[]1, 2, 0[]]",
            "E           assert [[]1, 2, 1[]] == [[]1, 2, 0[]]",
            "*the other ranks*",
            "rank 0 was in barrier() for *, called at *test_one_failing_rank.py:* in test_one: dist.barrier()",
            "*the collectives*",
            "  rank 0 called barrier() at *",
            "  rank 1 did not; it called no collective at all",
            "*Captured stdout of rank 0 call*",
            "here is 0",
            "*Captured stdout of rank 1 call*",
            "here is 1",
            "FAILED *test_one - rank 1: assert [[]1, 2, 1[]] == [[]1, 2*",
        ]
    )


def test_all_ranks_failing_show_all(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_all(rank):
    assert rank == 7, "no such rank"
""",
    )
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    for rank in (0, 1):
        assert f"rank {rank} of 2" in text
        assert f"assert {rank} == 7" in text


def test_a_hang(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed(timeout_s=1.5)
def test_hang(rank):
    print("before")
    if rank == 0:
        dist.all_reduce(torch.ones(4))
    time.sleep(60)

@pytest.mark.distributed
def test_next():
    dist.barrier()
""",
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "2 workers, not done after 1.5 s",
            "rank 0 was in all_reduce(float32 [[]4[]], op=SUM) for *: dist.all_reduce(torch.ones(4))",
            "rank 1 was still running",
            "        time.sleep(60)",
            "before",
        ]
    )


def test_exit_without_a_word_and_segfault(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_exit(rank):
    if rank == 1:
        os._exit(0)
    dist.barrier()

@pytest.mark.distributed
def test_segfault(rank):
    print("last words")
    if rank == 0:
        ctypes.string_at(0)

@pytest.mark.distributed
def test_next():
    dist.barrier()
""",
    )
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 2 exited with code 0 before it was done, without an exception",
            "rank 0 lost its connection: *",
            "rank 0 of 2 was killed by SIGSEGV:",
            "        ctypes.string_at(0)",
            "*Captured stdout of rank 0 call*",
            "last words",
        ]
    )


def test_failures_of_fixtures_are_errors(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.fixture
def bad_setup(rank):
    assert rank == 0

@pytest.fixture
def bad_teardown(rank):
    yield rank
    if rank == 1:
        raise RuntimeError("torn")

@pytest.mark.distributed
def test_setup(bad_setup):
    pass

@pytest.mark.distributed
def test_teardown(bad_teardown):
    pass
""",
    )
    result.assert_outcomes(errors=2, passed=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_setup*", "*ERROR at teardown of test_teardown*", "E*torn"])


def test_skip_and_xfail(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_skip():
    pytest.skip("not on this machine")

@pytest.mark.distributed
@pytest.mark.skipif(True, reason="never")
def test_skip_mark():
    raise AssertionError

@pytest.mark.distributed
def test_one_skips(rank):
    if rank == 1:
        pytest.skip("only one")

@pytest.mark.distributed
def test_xfail():
    pytest.xfail("known")

@pytest.mark.distributed
@pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
def test_xfail_mark():
    1 / 0

@pytest.mark.distributed
@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_with_another_error():
    raise KeyError

@pytest.mark.distributed
@pytest.mark.xfail(strict=False)
def test_xpass():
    pass

@pytest.mark.distributed
@pytest.mark.xfail(strict=True)
def test_strict_xpass():
    pass
""",
        "-rsx",
    )
    result.assert_outcomes(skipped=3, xfailed=2, xpassed=1, failed=2)
    result.stdout.fnmatch_lines(["*not on this machine*", "*rank 1: only one*", "*known*"])


def test_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
import os, threading, pytest

@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    return {"pid": os.getpid(), "path": tmp_path_factory.mktemp("once")}

@pytest.fixture(scope="module")
def derived(lock, made_once):
    return made_once["pid"]

@pytest.fixture(scope="module")
def lock():
    return threading.Lock()

@pytest.fixture
def in_worker(made_once):
    return os.getpid(), made_once["pid"]

@pytest.fixture(autouse=True, scope="module")
def everywhere():
    os.environ["EVERYWHERE"] = str(os.getpid())
"""
    )
    result = run(
        pytester,
        f"""
HOME = {os.getpid()}

@pytest.mark.distributed
def test_made_once(made_once, derived, in_worker):
    assert made_once["pid"] == derived == HOME
    assert in_worker == (os.getpid(), HOME)
    assert os.environ["EVERYWHERE"] == str(os.getpid())
    assert made_once["path"].is_dir()

@pytest.mark.distributed
def test_local(rank, monkeypatch, capsys, tmp_path_factory, request):
    monkeypatch.setenv("MINE", str(rank))
    dist.barrier()
    assert os.environ["MINE"] == str(rank)
    print("x", rank)
    assert capsys.readouterr().out == f"x {{rank}}\\n"
    assert f"rank-{{rank}}" in str(tmp_path_factory.mktemp("own"))
    assert request.node.name == "test_local"

@pytest.mark.distributed
def test_cannot(lock):
    pass
""",
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["the fixture 'lock' has module scope, so it is made once *cannot be pickled*"])


def test_workers_that_cannot_be_set_up_fail_once(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
class CannotArrive:
    def __reduce__(self):
        return int, ("not a number",)

@pytest.fixture(scope="session")
def unloadable():
    return CannotArrive()

@pytest.mark.distributed
def test_value(unloadable):
    pass

@pytest.mark.distributed(env={"OMP_NUM_THREADS": "many"})
def test_threads():
    pass
""",
    )
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["the fixture 'unloadable' has session scope, *cannot be unpickled (ValueError: *"])
    result.stdout.no_fnmatch_line("*ERROR at teardown*")


def test_failures_outside_the_body_are_brief(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or the summary is cut short
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_interrupted(rank):
    if rank == 1:
        raise KeyboardInterrupt

@pytest.mark.distributed
def test_missing(nowhere):
    pass
""",
        "-rfE",
    )
    result.assert_outcomes(failed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "rank 1 of 2 raised",
            "Traceback*",
            "*test_failures*.py*, in test_interrupted",
            "ERROR *::test_missing - rank ?: fixture 'nowhere' not found",
        ]
    )
    result.stdout.no_fnmatch_line("*site-packages*")


def test_warnings_and_properties_come_home(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed
def test_warns(rank):
    warnings.warn("mind the gap", DeprecationWarning)

@pytest.mark.distributed
@pytest.mark.filterwarnings("error")
def test_error():
    warnings.warn("as an error")
""",
    )
    result.assert_outcomes(passed=1, failed=1, warnings=1)
    result.stdout.fnmatch_lines(["*DeprecationWarning: mind the gap*"])


def test_without_capture_output_comes_at_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import pytest

@pytest.mark.distributed
def test_print(rank):
    print("straight from", rank)
"""
    )
    result = pytester.runpytest_subprocess("-s", "-p", "no:cacheprovider", timeout=240)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines_random(["*straight from 0*", "*straight from 1*"])


def test_first_failure_stops_and_expressions_select(pytester: pytest.Pytester) -> None:
    body = """
@pytest.mark.distributed
def test_a():
    raise ValueError
@pytest.mark.distributed
def test_b():
    pass
"""
    run(pytester, body, "-x").assert_outcomes(failed=1)
    run(pytester, body, "-k", "test_b").assert_outcomes(passed=1, deselected=1)
    run(pytester, body, "-m", "not distributed").assert_outcomes(deselected=2)


def test_the_debugger_is_refused_with_a_hint(pytester: pytest.Pytester) -> None:
    body = """
def test_plain():
    pass
@pytest.mark.distributed
def test_marked():
    pass
"""
    result = run(pytester, body, "--pdb")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --pdb and --trace cannot reach into worker processes*-m 'not distributed'*"])
    run(pytester, body, "--pdb", "-m", "not distributed").assert_outcomes(passed=1, deselected=1)


def test_misuse_is_explained(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed(wrld_size=2)
def test_typo():
    pass

@pytest.mark.distributed(world_size=0)
def test_nobody():
    pass

def test_unmarked(rank):
    pass

@pytest.mark.distributed
@pytest.mark.parametrize("value", [1], ids=[str(os.getpid())])
def test_changing_id(value):
    pass
""",
    )
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "@pytest.mark.distributed takes no argument 'wrld_size': did you mean world_size?",
            "world_size must be a whole number, at least 1, not 0",
            "the fixture 'rank' exists in tests marked @pytest.mark.distributed only",
            "*does not exist when a worker collects its file*",
        ]
    )


def test_wrong_arguments_of_the_marker_are_told_without_a_traceback(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.distributed(world_size=True)
def test_size():
    pass

@pytest.mark.distributed(2, 30)
def test_positional():
    pass

@pytest.mark.distributed(timeout_s=-1)
def test_timeout():
    pass

@pytest.mark.distributed(process_group="nccl")
def test_backend():
    pass

@pytest.mark.distributed(env={"A": 1})
def test_env():
    pass

@pytest.mark.distributed(world_size=2, hosts=3)
def test_hosts():
    pass

@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, "2"])
def test_sizes(world_size):
    pass
""",
    )
    result.assert_outcomes(errors=7, passed=1)
    result.stdout.no_fnmatch_line("*Error*")
    result.stdout.fnmatch_lines_random(
        [
            "world_size must be a whole number, at least 1, not True",
            "only world_size can be given without its name, not also 30: write timeout_s=...",
            "timeout_s must be a number of seconds above 0, not -1",
            "process_group must be True or False, not 'nccl': True is a gloo group; *",
            "env must have strings as names and values, not 'A': 1; write 'A': '1'",
            "world_size 2 cannot be spread evenly over 3 hosts",
            "world_size must be a whole number, at least 1, not '2'",
        ]
    )


def test_what_cannot_run_in_workers_fails_and_nothing_else(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
import unittest
class TestOld(unittest.TestCase):
    @pytest.mark.distributed
    def test_old(self):
        pass
    def test_unmarked(self):
        pass

@pytest.mark.distributed
async def test_nobody_awaits():
    pass

@pytest.mark.distributed
def test_plain():
    pass
""",
    )
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["errors"]) == (2, 1)
    assert outcomes.get("failed", 0) + outcomes.get("skipped", 0) == 1  # pytest before 8.4 skips what nobody awaits
    result.stdout.fnmatch_lines(["*call disttrain.testing.run_workers in it instead*"])
    result.stdout.fnmatch_lines(["*async def functions are not natively supported*"])


def test_a_module_that_starts_threads_still_works(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
import threading
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

@pytest.mark.distributed
def test_threads(rank):
    assert torch.ones(2).sum() == 2
    assert len(threading.enumerate()) >= 2
""",
    )
    result.assert_outcomes(passed=1)


def test_run_workers_inside_a_test_finds_its_module(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
from disttrain.testing import run_workers

class Value:
    pass

def body():
    return Value()

def failing():
    found = {"a": 1}
    assert found == {"a": 2}

def test_types_are_the_same():
    assert all(type(value) is Value for value in run_workers(body, 2))

def test_introspection():
    run_workers(failing, 1)
""",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*assert {'a': 1} == {'a': 2}*"])


def test_a_rank_that_a_fault_takes_does_not_count(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
from disttrain.faultpoints import reached
from disttrain.testing import faults

@pytest.mark.distributed(faults=[faults.kill(1, at="half way")], timeout_s=240)
def test_survivor_notices(rank):
    reached("half way")
    assert rank == 0
    with pytest.raises(RuntimeError, match="onnection"):
        dist.barrier()
""",
    )
    result.assert_outcomes(passed=1)


@pytest.mark.long
def test_with_xdist(pytester: pytest.Pytester) -> None:
    mark = f"DISTTRAIN_MARK={uuid.uuid4().hex}"
    pytester.makepyfile(
        """
import pytest

@pytest.mark.distributed
@pytest.mark.parametrize("number", range(4))
def test_in_workers(rank, number, worker_id):
    assert worker_id.startswith("gw")
    assert number != 3, "number three"
"""
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=480, env=os.environ | dict([mark.split("=")]), check=False
    )
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "rank 1 of 2" in done.stdout
    assert "AssertionError: number three" in done.stdout
    assert marked_processes(mark) == []


def test_the_plugin_costs_nothing_to_others(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_plain():\n    import sys\n    assert 'torch' not in sys.modules\n")
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest").assert_outcomes(passed=1)
    script = """
import sys, pytest
before = set(sys.modules)
import disttrain.testing.plugin
print(sorted(set(sys.modules) - before))
"""
    names = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240
    ).stdout
    assert "disttrain" in names
    assert not any(name in names for name in ("'torch", "numpy", "pydantic", "subprocess")), names


def test_fifty_tests_leak_nothing(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        f"""
import gc, json, os, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.disttrain.testing.left_behind import descendants, open_files, resident_kib

SEEN = []
COUNT = []

def pytest_runtest_logfinish(nodeid):
    COUNT.append(nodeid)
    if len(COUNT) not in (15, 50):
        return
    gc.collect()
    below = descendants(os.getpid())
    servers = sorted(below)
    SEEN.append([len(below), open_files(os.getpid()), resident_kib(os.getpid()),
                 [open_files(pid) for pid in servers], [resident_kib(pid) for pid in servers]])

def pytest_sessionfinish():
    open("seen.json", "w").write(json.dumps(SEEN))
"""
    )
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.distributed
@pytest.mark.parametrize("number", range(50))
def test_trivial(number):
    if number % 25 == 7:
        os._exit(0)
    if number % 25 == 8:
        raise ValueError
    dist.barrier()
"""
    )
    import json

    mark = f"DISTTRAIN_MARK={uuid.uuid4().hex}"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | dict([mark.split("=")]), check=False
    )
    assert "4 failed, 46 passed" in done.stdout, done.stdout + done.stderr
    seen = json.loads((pytester.path / "seen.json").read_text())
    early, late = seen
    assert late[0] == early[0] == 2, "processes between two tests: the fork server, and the one with the test file"
    assert late[1] == early[1], "file descriptors of pytest"
    assert late[3] == early[3], "file descriptors of the fork servers"
    assert late[2] - early[2] < 4 * 1024, "memory of pytest, KiB"
    assert all(after - before < 2 * 1024 for before, after in zip(early[4], late[4], strict=True)), (
        "of the servers, KiB"
    )
    assert marked_processes(mark) == []
