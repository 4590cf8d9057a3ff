"""What a run does with an error that may come from the loss of a worker; the losses themselves: tests/launch/local."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist

from disttrain.distributed import regroup
from disttrain.distributed.verdicts import Verdict
from disttrain.distributed.world import _Group, join_world
from disttrain.recipe import as_recipe
from disttrain.training import recovery as module
from disttrain.training.recovery import Recovery


class Failure(RuntimeError):
    pass


def test_an_error_that_ends_the_run_is_not_held_by_its_own_frames() -> None:
    """As long as it is held, so are the job and its process group, for whose end the other ranks wait."""
    job: Any = SimpleNamespace(recipe=as_recipe({"name": "mine"}), world=SimpleNamespace(group=None))
    others: Any = SimpleNamespace(saver=SimpleNamespace())
    recovery = Recovery(job, others, others, None)

    def fit() -> None:
        try:
            raise Failure
        except RuntimeError as error:
            recovery.survive(error)

    gc.disable()
    try:
        fit()
    except Failure as error:
        held = weakref.ref(error)
    finally:
        gc.enable()
    assert held() is None


def test_others_that_hang_in_the_step_in_which_one_was_killed_for_it_are_left_to_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that hangs whoever computes it would have all killed, one after the other, and their replacements."""
    monkeypatch.setattr(module, "report_ready", lambda **_: None)
    job: Any = SimpleNamespace(recipe=as_recipe({"name": "mine"}), world=SimpleNamespace(group=None), step=5)
    others: Any = SimpleNamespace(saver=SimpleNamespace(), is_possible=True)
    recovery = Recovery(job, others, others, None)
    recovery._is_ready = True
    assert recovery._report_hung([2])
    assert recovery._report_hung([2, 3]), "in the same group it may be said again"
    recovery._generation = 1
    assert not recovery._report_hung([1])
    job.step = 6
    assert recovery._report_hung([1])


def test_after_a_group_that_did_not_form_though_all_are_there_the_next_has_longer_to_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Machines that are too slow for one would form none. After a loss it is as short as before."""
    found: list[float] = []

    def times_out(store: object, rank: int, size: int, to_connect: timedelta) -> None:
        found.append(to_connect.total_seconds())
        raise Failure("Timed out waiting for a connection")

    monkeypatch.setattr(module, "report_ready", lambda **_: None)
    monkeypatch.setattr(regroup, "init_gloo", times_out)
    lost, again = Verdict(1, 0, 1, lost_ranks=(1,)), Verdict(1, 0, 1)
    verdicts = iter([lost, lost, *[again] * 6, Verdict(1, None)])
    others: Any = MagicMock()
    with join_world("cpu", threads=1) as world:
        alone = replace(world, group=_Group(dist.HashStore(), "", 0, timedelta(minutes=1), 60.0, 0))
    job: Any = MagicMock(recipe=as_recipe({"name": "mine"}), world=alone, step=5)
    recovery = Recovery(job, others, others, None)
    recovery._is_ready = True
    recovery._verdicts = MagicMock(wait=lambda timeout_s: next(verdicts) if timeout_s else None)
    with pytest.raises(Failure):
        recovery.survive(Failure("Connection closed by peer"))
    assert found == [0.5, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


class Mailbox:
    """A pipe for verdicts that counts how often it was looked into."""

    def __init__(self) -> None:
        self.looks, self.is_full = 0, False

    def have_come(self) -> bool:
        self.looks += 1
        return self.is_full


def test_steps_that_are_short_do_not_each_look_for_a_verdict_and_none_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look is a system call of each worker, at each step of a run that loses nobody."""
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(module, "time", clock)
    now = 100.0
    job: Any = SimpleNamespace(recipe=as_recipe({"name": "mine"}), world=SimpleNamespace(group=None), step=5)
    others: Any = SimpleNamespace(saver=SimpleNamespace(), is_possible=True)
    recovery, mailbox = Recovery(job, others, others, None), Mailbox()
    recovery._verdicts, recovery._is_ready = mailbox, True  # type: ignore[assignment]
    for _ in range(1000):  # of a millisecond each
        now += 0.001
        recovery.after_step()
    assert 10 <= mailbox.looks <= 30
    mailbox.is_full, now = True, now + 0.1
    with pytest.raises(RuntimeError):
        recovery.after_step()
