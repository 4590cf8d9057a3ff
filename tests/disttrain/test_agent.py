"""What the agent of a node makes of its workers' ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from disttrain.agent.cause import Cause
from disttrain.agent.elastic import Agent
from disttrain.report import report_finished


class Bulletin:
    """One node's own."""

    def __init__(self) -> None:
        self.announced: list[Cause] = []

    def ended(self) -> None:
        return None

    def first_of_all(self, cause: Cause, patience_s: float) -> Cause:
        return cause

    def announce(self, cause: Cause) -> None:
        self.announced.append(cause)


@pytest.mark.parametrize("state", [WorkerState.HEALTHY, WorkerState.SUCCEEDED])
def test_a_worker_that_left_with_0_and_has_not_finished_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: WorkerState
) -> None:
    """torch takes its 0 for success; the others may be waiting for it."""
    files = {rank: str(tmp_path / f"error-{rank}.json") for rank in range(2)}
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", files[0])
    report_finished()
    codes = {0: 0, 1: 0}
    handlers = {rank: SimpleNamespace(proc=SimpleNamespace(poll=lambda rank=rank: codes[rank])) for rank in codes}
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda *_: RunResult(state=state))
    agent: Any = Agent.__new__(Agent)
    agent.cause, agent._host, agent._remaining_restarts, bulletin = None, "box", 0, Bulletin()
    agent._pcontext = SimpleNamespace(subprocess_handlers=handlers, error_files=files)
    agent._newest_step, agent._failed_at = lambda: 0, None
    agent.bulletin = lambda: bulletin
    group: Any = SimpleNamespace(workers=[SimpleNamespace(global_rank=rank + 4) for rank in range(2)])
    assert agent._monitor_workers(group).state is WorkerState.FAILED
    assert agent.cause.message.startswith("rank 5 on box ended with exit code 0 before its work was done")
    assert bulletin.announced == [agent.cause]
    agent.cause = None
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", files[1])
    report_finished()
    assert agent._monitor_workers(group).state is state
    assert agent.cause is None
