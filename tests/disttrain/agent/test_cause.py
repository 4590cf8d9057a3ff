"""Which of the failures of a machine's workers is the cause, and what the job says of it."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from disttrain.agent.cause import first_cause
from disttrain.errors import ExitCode


def failure(code: int, message: str | None = None, at: float = 1.0, **more: Any) -> ProcessFailure:
    """How torch describes a worker that exited with `code` and wrote this report, if it wrote one."""
    failed = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="N/A")
    if message is not None:
        failed.error_file_data = {"message": message, "exit_code": code, "host": "box", "time": at, **more}
    return failed


LOST = failure(1, "lost the connection", at=0.0, consequence=True)


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        ({0: LOST, 1: failure(70, "the loss is NaN", at=9.0)}, 70, "the loss is NaN"),
        ({0: LOST, 1: failure(78, "no such folder", at=9.0)}, 78, "rank 1 on box: no such folder"),
        ({0: LOST, 5: failure(-signal.SIGKILL)}, 1, "rank 5 on here was killed by SIGKILL (usually because the"),
        ({0: failure(1, "second", at=2.0), 1: failure(1, "first", at=1.0)}, 1, "rank 1 on box: first"),
        ({0: failure(-signal.SIGABRT), 1: LOST}, 1, "rank 0 on here was killed by SIGABRT"),
        ({0: failure(1, "the disk is full", is_agreed=True)}, 1, "the disk is full"),
        ({0: failure(75, "stopped after step 7")}, 75, "stopped after step 7"),
        ({3: failure(3)}, 3, "rank 3 on here exited with code 3 without giving a reason"),
        ({0: LOST}, 1, "rank 0 on box: lost the connection"),
        ({}, 1, "a worker on here ended"),
    ],
)
def test_the_cause_comes_before_its_consequences(failures: dict[int, ProcessFailure], code: int, message: str) -> None:
    cause = first_cause(failures, "here")
    assert cause.code == code
    assert cause.message.startswith(message)
    assert cause.is_consequence == (list(failures.values()) == [LOST])


def test_what_is_worth_a_retry() -> None:
    final = {code for code in range(256) if ExitCode.is_final(code)}
    assert final == {0, 2, 70, 71, 75, 78, 141}
    assert not ExitCode.is_final(-signal.SIGKILL)
    assert [code for code in range(256) if ExitCode.explains(code)] == [2, 70, 78]
