"""Single workers killed from outside while a run goes on, as `disttrain prove --lose` does it."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from disttrain.errors import ConfigurationError
from disttrain_launch.cli import main
from disttrain_launch.prove import losses as losses_module
from disttrain_launch.prove.disturbed import DisturbedRun, RunFailed
from disttrain_launch.prove.losses import Group, Losses, Pace
from disttrain_launch.prove.proof import Proof
from disttrain_launch.prove.report import as_table, is_proven
from tests.disttrain.testing.left_behind import shared_memory_of
from tests.launch.local.forked import Run
from tests.launch.local.test_losses import CONTINUE, check, events, launch, lost_ranks
from tests.launch.prove.test_prove import left_in, prove

LONGER = ("train.epochs=8", "train.eval_every_epochs=8", "checkpoint.every_steps=5")
STEPS = 40
EPOCHS = 600  # of five steps, in each run of a thousand losses
THOUSAND = 1000


class SeveralAtOnce(Losses):
    """Kills others together with some, but neither all nor rank 1 with rank 0, whose copy of a checkpoint it has."""

    def _kill(self, group: Group, rank: int) -> bool:
        others = [one for one in range(1, len(group.places)) if one != rank and {one, rank} != {0, 1}]
        most = min(len(others), len(group.places) - 2)
        workers = self._workers()
        if group.places[rank] in workers and most > 0:
            for one in self._draw.sample(others, self._draw.randrange(most + 1)):
                with suppress(KeyError, psutil.Error):  # it has just ended
                    workers[group.places[one]].kill()
        return super()._kill(group, rank)


def lose_from_outside(
    run: Run, steps: int, most: int, *more: Run, kind: type[Losses] = Losses, seen: set[int] | None = None
) -> tuple[Losses, Group, list[dict[str, Any]]]:
    """Run these in turn, and kill workers of the first: what `prove` sees are its processes and its journal.

    The numbers of its processes are added to `seen`.
    """
    seen = set() if seen is None else seen
    with ThreadPoolExecutor(1) as pool:
        group = Group(Path(run.folder) / "journal.jsonl", run.size)
        ended = pool.submit(launch, run, *more)

        def workers() -> Mapping[int, psutil.Process]:
            (launcher,) = [one for one in psutil.Process().children() if "tests.launch.local.forked" in one.cmdline()]
            found = {}
            seen.add(launcher.pid)
            for child in sorted(launcher.children(), key=psutil.Process.create_time):
                seen.add(child.pid)
                with suppress(psutil.Error):  # it has just ended
                    found[child.name()] = child
            return {rank: found[name] for rank in range(run.size) if (name := f"rank-{rank}") in found}

        def pause(seconds: float) -> bool:
            time.sleep(seconds)
            return not ended.done()

        losses = kind(workers, pause, steps, Pace(start_up_s=1.0, step_s=0.2))
        losses.deal(group, most, steps)
        return losses, group, ended.result()


def test_a_zombie_does_not_count_as_a_worker_that_outlived_its_run(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended, subprocess.Popen(["sleep", "60"]) as running:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        run = DisturbedRun(tmp_path / "run", [])
        run._seen = {psutil.Process(ended.pid)}
        run._conclude(0)
        run._seen = {psutil.Process(running.pid)}
        with pytest.raises(RunFailed, match="outlived"):
            run._conclude(0)
        running.kill()


def test_a_run_of_a_single_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a step would be 0, and so there would be no end to the steps that it needs."""

    def run(self: DisturbedRun, workers: int) -> None:
        self.run_dir.mkdir()
        row = {"kind": "metrics", "time": time.time(), "step": 1, "metrics": {"train/loss": 1.0}}
        (self.run_dir / "journal.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(DisturbedRun, "run", run)
    monkeypatch.setattr(DisturbedRun, "words_after", lambda *_: None)
    with pytest.raises(ConfigurationError, match=r"--lose: a run of 1 step .+ train\.epochs"):
        Proof(tmp_path, (), (2,), 0, lambda _: None, losses=20).carry_out()


def test_workers_killed_from_outside_are_counted_with_the_time_until_the_next_step(tmp_path: Path) -> None:
    reference = Run(str(tmp_path / "undisturbed"), size=1, overrides=LONGER)
    lossy = Run(str(tmp_path / "disturbed"), size=3, overrides=(CONTINUE, *LONGER), waits_at=[20])
    losses, group, ended = lose_from_outside(lossy, STEPS, 1, reference)
    (loss,) = losses.made
    assert 0.0 < loss.seconds < 240.0
    check(tmp_path, ended, [loss.rank])
    assert group.restarts == 0
    for event in events(tmp_path / "disturbed", "worker-joined"):
        assert event["joined_ranks"] == [loss.rank]


class _Zero(random.Random):
    """Draws the least there is."""

    def random(self) -> float:
        return 0.0

    def randrange(self, *arguments: Any) -> int:
        return 0


def journalled(folder: Path, *records: Mapping[str, Any]) -> Group:
    group = Group(folder / "journal.jsonl", 3)
    lines = [json.dumps({"time": time.time() + 1.0 + number, **record}) for number, record in enumerate(records)]
    (folder / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    group.read()
    return group


def step(number: int) -> dict[str, Any]:
    return {"kind": "metrics", "step": number, "metrics": {"train/loss": 1.0}}


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "event", "name": name, **fields}


def test_the_journal_shows_who_makes_the_steps(tmp_path: Path) -> None:
    lost = event("worker-lost", lost_ranks=[0])
    group = journalled(tmp_path, event("start"), step(1), event("checkpoint"), lost, step(2), step(3))
    assert (group.places, group.num_steps, group.step, group.is_saved) == ([1, 2], 2, 3, False)
    joined = event("worker-joined", joined_ranks=[0])
    group = journalled(tmp_path, event("start"), step(1), lost, step(2), joined, step(3), event("checkpoint"))
    assert (group.places, group.num_steps, group.losses, group.is_saved) == ([1, 2, 0], 1, 1, True)
    group = journalled(tmp_path, event("start"), step(1), lost, event("resume"), step(2))
    assert (group.places, group.restarts, group.num_steps) == ([0, 1, 2], 1, 1)


def test_rank_0_is_spared_until_its_checkpoint_is_there_and_the_last_steps_are_left_alone(tmp_path: Path) -> None:
    """Else a run would have to restart."""
    looks = 0

    def pause(seconds: float) -> bool:
        nonlocal looks
        looks += 1
        return looks < 200

    def workers() -> Mapping[int, psutil.Process]:
        raise AssertionError("a worker was to be killed")

    start = event("start")
    group = journalled(tmp_path, start, step(1), step(2))
    losses = Losses(workers, pause, 1000, Pace(0.0, 0.1), _Zero())
    losses.deal(group, 1, 1000)
    assert looks == 200
    ending = journalled(tmp_path, start, step(996), step(997), event("checkpoint"))
    losses.deal(ending, 5, 1000)
    assert losses.made == []


def test_the_table_of_losses_says_what_each_cost() -> None:
    run = {"workers": 4, "kills": 0, "steps_repeated": 0, "weights_sha256": "ab" * 32, "optimizer_sha256": "cd" * 32}
    lossy = {
        "losses": 3,
        "lost_ranks": {"0": 1, "3": 2},
        "seconds_per_loss": {"median": 0.164, "worst": 1.4},
        "slices_recomputed": 8,
        "restarts": 1,
    }
    none = {"losses": 0, "lost_ranks": {}, "seconds_per_loss": None, "slices_recomputed": 0, "restarts": 0}
    result = {
        "same": True,
        "exact": True,
        "reference": {**run, "steps": 50},
        "runs": [{**run, **lossy, "same": True}, {**run, **none, "same": True}],
    }
    table = as_table(result)
    assert "4        3       0 x1, 3 x2  0.16        1.40   8             1" in table
    assert "4        0       -           -           -      0             0" in table
    assert table.endswith(
        "same bits: 50 steps, 2 disturbed runs, 3 losses, 0 kills, 0 steps repeated\nBut 1 loss restarted the run."
    )
    assert as_table({**result, "losses_wanted": 2}).endswith(
        "But only 3 of 4 losses came before the end: give more --steps."
    )
    assert "But only" not in as_table({**result, "losses_wanted": 1})
    assert is_proven({**result, "runs": [{**run, **lossy, "restarts": 0}], "losses_wanted": 9})
    assert not is_proven({**result, "runs": [{**run, **lossy}], "losses_wanted": 3})
    assert not is_proven({**result, "runs": [{**run, **none}], "losses_wanted": 3})


@pytest.mark.long
def test_losses_and_kills_in_one_proof(tmp_path: Path) -> None:
    answer = json.loads(prove(tmp_path, "--workers", "2,3", "--lose", "4", "--kills", "1", "--json").stdout)
    assert answer["same"] is True
    for run in answer["runs"]:
        assert (run["kills"], run["losses"], run["restarts"]) == (1, 4, 0)
        assert sum(run["lost_ranks"].values()) == 4
        assert 0 < run["seconds_per_loss"]["median"] <= run["seconds_per_loss"]["worst"]
    assert left_in(tmp_path) == []


def test_a_recipe_that_cannot_continue_is_refused_with_the_reason_before_anything_is_trained() -> None:
    done = CliRunner().invoke(main, ["prove", "digits", "--workers", "2", "--lose", "1", "-o", "train.spike_factor=9"])
    assert done.exit_code == 78
    assert done.stderr == (
        "disttrain: --lose: this recipe cannot continue without a lost worker: train.spike_factor is set\n"
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_thousand_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any worker, often of several at once, in as many runs as it takes; each has the bits of one undisturbed run.

    About five minutes where nothing else runs. Nothing is left behind.
    """
    monkeypatch.setattr(losses_module, "_LONGEST_PAUSE_S", 0.1)
    steps = 5 * EPOCHS
    longest = (f"train.epochs={EPOCHS}", "train.eval_every_epochs=50", "checkpoint.every_steps=10")
    reference = launch(Run(str(tmp_path / "undisturbed"), size=1, overrides=longest))
    total, times, seconds, number = 0, 0, [], 0
    processes: set[int] = set()
    while total < THOUSAND:
        number += 1
        run = Run(str(tmp_path / f"{number}"), overrides=(CONTINUE, *longest), most_losses=10_000)
        losses, group, ended = lose_from_outside(run, steps, THOUSAND - total, kind=SeveralAtOnce, seen=processes)
        lost = lost_ranks(tmp_path / f"{number}")
        check(tmp_path, [*reference, *ended], lost, f"{number}")
        assert group.restarts == 0
        assert len(lost) >= len(losses.made) > 0
        total, times, seconds = (
            total + len(lost),
            times + group.losses,
            [*seconds, *(one.seconds for one in losses.made)],
        )
        assert not [one for one in psutil.process_iter(["cmdline"]) if run.folder in str(one.info["cmdline"])]
    middle, worst = statistics.median(seconds), max(seconds)
    print(f"{total} workers lost in {times} losses, {number} runs: median {middle:.2f} s, worst {worst:.2f} s")
    assert shared_memory_of(processes) == []
