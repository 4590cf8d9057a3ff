"""What the launcher makes of its workers' ends."""

from __future__ import annotations

import signal

from disttrain.distributed.ending import Report
from disttrain_launch.outcome import LocalEnding, settle


def ending(rank: int, code: int, report: Report | None = None, *, asked: bool = False) -> LocalEnding:
    return LocalEnding(rank, code, 100.0 + rank, report, asked, None, "")


def test_a_failure_that_rank_0_decided_names_no_rank_whoever_told_it_first() -> None:
    """As when a disk is full: only rank 0 saves, and every rank raises the same, unless it was ended before."""
    words = "the checkpoint of step 8 could not be saved: make room on the disk of runs/a"
    first, last = Report(words, "b", 9.0, None, is_agreed=True), Report(words, "a", 10.0, None, is_agreed=True)
    for of_rank_0 in (ending(0, 1, last), ending(0, -signal.SIGTERM, asked=True)):
        outcome = settle([of_rank_0, ending(1, 1, first)], stop_requested=False)
        assert (outcome.exit_code, outcome.message) == (1, words)


def test_a_worker_that_is_killed_is_a_loss_and_one_that_fails_is_none() -> None:
    gone = Report("Connection closed by peer", "a", 9.0, None, is_consequence=True)
    lost = settle([ending(0, 1, gone), ending(1, -signal.SIGKILL)], stop_requested=False)
    assert (lost.exit_code, lost.is_loss) == (1, True)
    assert not settle([ending(0, 1, gone), ending(1, 1)], stop_requested=False).is_loss


def test_an_unexpected_failure_names_its_rank() -> None:
    report = Report("ValueError: odd", "b", 9.0, "Traceback …")
    outcome = settle([ending(0, -signal.SIGTERM, asked=True), ending(1, 1, report)], stop_requested=False)
    assert (outcome.exit_code, outcome.message, outcome.traceback) == (1, "rank 1 on b: ValueError: odd", "Traceback …")
