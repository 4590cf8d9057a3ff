"""Every stage of a save under fire: whatever ends it, a good checkpoint is there and the run can go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from disttrain.checkpoint import (
    CheckpointStore,
    CheckpointWriter,
    optimizer_from_tensors,
    optimizer_to_tensors,
    read_checkpoint,
    weights_sha256,
)
from disttrain.commands import runs
from disttrain.faultpoints import VARIABLE, arm
from disttrain.runs.journal import read_journal
from disttrain.testing import faults, small_disk, workers
from disttrain.testing.disk import why_not
from disttrain.testing.faults import Fault
from tests.disttrain.checkpoint.test_checkpoint import save, state
from tests.disttrain.parallel.exact_runs import train

# In the order in which a save comes to them; "moved away" only if there is a checkpoint of that step.
STAGES = ["asked for", "begun", "tensors", "state", "written", "moved away", "named", "durable", "retired"]


class Interrupted:
    """A training so small that a start takes milliseconds; it goes on from its newest checkpoint."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.store = CheckpointStore(folder, keep_last=1)
        self.num_steps = num_steps
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step = 0

    def run(self, every: int = 1) -> None:
        """Train to the end, saving every so many steps. Fails if there was a checkpoint once and none is good now."""
        self.store.clear_unfinished()
        checkpoint = self.store.newest(pytest.fail)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.model)
            optimizer_from_tensors(self.optimizer, checkpoint.optimizer, checkpoint.state["optimizer"])
            self.step = checkpoint.state["step"]
        begun = self.store.folder.parent / "begun"
        assert checkpoint is not None or not begun.exists(), "a checkpoint was there once"
        writer = CheckpointWriter(self.store, self.optimizer)
        while self.step < self.num_steps:
            self.optimizer.zero_grad()
            batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(self.step))
            self.model(batch).square().sum().backward()
            self.optimizer.step()
            self.step += 1
            if self.step % every:
                continue
            moments, rest = optimizer_to_tensors(self.optimizer)
            before = writer.save(self.model.state_dict(), moments, {**state(self.step), "optimizer": rest})
            assert before is None or before.path is not None
            if before is not None:
                begun.touch()
            if self.step % 3 == 0:  # the same step again, as after an evaluation
                writer.save(
                    self.model.state_dict(), moments, {**state(self.step, self.step / 10_000), "optimizer": rest}
                )
        writer.close()


def go_on_and_be_killed(folder: Path, num_steps: int, fault: Fault) -> bool:
    """A start in a forked process with a fault in it. False if it came to its end; fails if it could not go on."""
    with faults.armed(fault) as environment:
        child = os.fork()
        if child == 0:
            try:
                arm(environment[VARIABLE])
                Interrupted(folder, num_steps).run()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "a run could not go on: see above"
    return code != 0


def run_with_kills(folder: Path, num_kills: int, seed: int) -> None:
    """SIGKILLs at random points and moments of saves, of which none may be the end of the run or show in its bits."""
    Interrupted(folder / "first" / "checkpoints", 1).run()  # what is imported on the way is there for all forks
    dice, kills = random.Random(seed), 0
    undisturbed, killed = folder / "undisturbed" / "checkpoints", folder / "killed" / "checkpoints"
    while kills < num_kills:
        fault = faults.kill(0, after_s=dice.uniform(0.001, 0.02))
        if dice.random() < 0.8:
            fault = faults.kill(None, at=f"checkpoint: {dice.choice(STAGES)}", count=dice.randrange(1, 4))
        kills += go_on_and_be_killed(killed, newest_step(killed) + 4, fault)
    num_steps = 3 * (newest_step(killed) // 3 + 2)
    Interrupted(killed, num_steps).run()
    Interrupted(undisturbed, num_steps).run(every=num_steps)
    theirs, ours = read_checkpoint(newest(undisturbed)), read_checkpoint(newest(killed))
    assert ours.state == theirs.state
    assert weights_sha256(ours.model) == weights_sha256(theirs.model)
    assert weights_sha256(ours.optimizer) == weights_sha256(theirs.optimizer)
    assert os.listdir(killed) == [f"step-{num_steps:08d}"], "something is left of a save that was killed"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where that is to be had: SIGKILL does not ask for a disk, and fsync would take the time."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_kills", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_kills_during_saves_leave_no_trace(memory: Path, num_kills: int) -> None:
    with workers(1, process_group=False, timeout_s=240 + 6 * num_kills, env={"TMPDIR": str(memory)}) as group:
        group.run(run_with_kills, memory, num_kills, random.randrange(10**6))


def newest(folder: Path) -> Path:
    return CheckpointStore(folder).paths()[-1]


def newest_step(folder: Path) -> int:
    paths = CheckpointStore(folder).paths()
    return int(paths[-1].name.removeprefix("step-")) if paths else 0


def save_second(folder: Path, *, again: bool) -> None:
    store = CheckpointStore(folder, keep_last=1)
    save(store, 1 if again else 2, value=2.0)


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_kill_at_each_stage_leaves_one_good_checkpoint(tmp_path: Path, stage: str, again: bool) -> None:
    if stage == ("retired" if again else "moved away"):
        return  # not a stage of this save
    save(CheckpointStore(tmp_path), 1, value=1.0)
    fault = faults.kill(0, at=f"checkpoint: {stage}")
    with workers(1, faults=[fault], process_group=False) as group:
        group.attempt(save_second, tmp_path, again=again)
    assert fault.happened
    left = CheckpointStore(tmp_path).unfinished()
    store = CheckpointStore(tmp_path, keep_last=1)
    store.clear_unfinished()
    checkpoint = store.newest(pytest.fail)
    assert checkpoint is not None
    is_new = stage in ("named", "durable", "retired")
    assert checkpoint.model["a"][0, 0] == (2.0 if is_new else 1.0)
    assert bool(left) == (again or stage not in ("named", "durable"))
    assert not store.unfinished()


@contextmanager
def without_root(user: int = 65534) -> Iterator[None]:
    """As a user whom permissions bind."""
    before = os.geteuid()
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user needs root")
def test_a_folder_that_may_not_be_written_keeps_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = save(CheckpointStore(folder), 1)
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    writer = CheckpointWriter(CheckpointStore(folder))
    with without_root():
        writer.save({"a": torch.ones(1)}, {}, state(2))
        outcome = writer.wait()
    writer.close()
    assert outcome is not None
    assert "Permission denied" in outcome.error
    assert [*folder.iterdir()] == [path]
    assert read_checkpoint(path).state["step"] == 1


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_disk_that_is_really_full_keeps_its_checkpoint_and_takes_the_next_when_there_is_room(tmp_path: Path) -> None:
    weights = {"a": torch.arange(50_000.0)}
    with small_disk(tmp_path / "disk", 2**20) as disk:
        store = CheckpointStore(disk.path / "checkpoints", keep_last=2)
        writer = CheckpointWriter(store)
        errors = []
        for step, leave in [(1, None), (2, 0), (3, 8192), (4, 150_000), (5, 199_000), (6, None)]:
            if leave is not None:
                disk.fill(leave)
            writer.save(weights, {}, state(step))
            outcome = writer.wait()
            assert outcome is not None
            errors.append(outcome.error)
            assert store.paths()
            assert not store.unfinished(), "it would take the room that the next one needs"
            disk.free()
        writer.close()
        assert ["No space left" in error for error in errors] == [False, True, True, True, True, False]
        assert [path.name for path in store.paths()] == ["step-00000001", "step-00000006"]
        assert all(read_checkpoint(path).model["a"][-1] == 49_999 for path in store.paths())


def test_verify_tells_of_everything_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep_last=9)
    for step in (1, 2, 3):
        save(store, step)
    shutil.copytree(folder / "step-00000003", folder / ".step-00000004.writing")
    (folder / "step-00000003" / "state.json").write_text("{}")
    assert store.newest(lambda _: None) is not None
    (folder / "step-00000001" / "model.safetensors").write_bytes(b"")
    done = CliRunner().invoke(runs.command, ["verify", str(tmp_path), "--json"])
    report = json.loads(done.stdout)
    assert [Path(entry["path"]).name for entry in report["checkpoints"] if entry["good"]] == ["step-00000002"]
    (damaged,) = (entry for entry in report["checkpoints"] if not entry["good"])
    assert damaged["path"] == str(folder / "step-00000001")
    assert "model.safetensors" in damaged["detail"]
    assert report["set_aside"] == [str(folder / "step-00000003.damaged")]
    assert report["unfinished"] == [str(folder / ".step-00000004.writing")]
    assert "1 of 2 checkpoints damaged" in str(done.exception)


def lose_at(run_dir: Path, step: int, moved_to: Path | None) -> None:
    """Train, and lose the run directory after a step."""
    import disttrain.training.loop as loop

    reached = loop.reached

    def deleting(name: str, **where: int) -> None:
        reached(name, **where)
        if name == "step" and where["step"] == step:
            gone = moved_to or run_dir.with_name("deleted")
            run_dir.rename(gone)  # at once: the thread that writes a checkpoint may be adding files
            if moved_to is None:
                shutil.rmtree(gone, ignore_errors=True)

    loop.reached = deleting  # type: ignore[assignment]
    try:
        train(run_dir, "checkpoint.every_steps=2")
    finally:
        loop.reached = reached


@pytest.mark.parametrize("moved_to", [None, "elsewhere"])
def test_a_run_directory_lost_under_the_job_comes_back_with_the_next_save(tmp_path: Path, moved_to: str | None) -> None:
    run_dir = tmp_path / "run"
    with workers(1, process_group=False) as group:
        group.run(lose_at, run_dir, 3, tmp_path / moved_to if moved_to else None)
        group.run(train, run_dir, "checkpoint.every_steps=2")  # finished already: it is a whole run
    assert read_checkpoint(newest(run_dir / "checkpoints")).state["finished"]
    logged = [record["step"] for record in read_journal(run_dir / "journal.jsonl") if record["kind"] == "metrics"]
    assert 1 in logged, "what the journal held is back"
    assert 10 in logged
    log = (tmp_path / (moved_to or "run") / "logs" / "worker-0.log").read_text()
    assert moved_to is None or f"{run_dir} was moved or deleted under the job. It is there again" in log


def saved_steps(run_dir: Path) -> list[int]:
    records = read_journal(run_dir / "journal.jsonl")
    return [record["step"] for record in records if record.get("name") == "checkpoint"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 5 steps an epoch, 2 epochs
        ((), [5, 10]),
        (("checkpoint.every_steps=2",), [2, 4, 5, 6, 8, 10]),
        (("checkpoint.every_steps=5",), [5, 10]),
        (("train.eval_every_epochs=2",), [5, 10]),
        (("train.eval_every_epochs=2", "checkpoint.every_steps=5"), [5, 10]),
        (("checkpoint.every_seconds=1e-9",), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (("checkpoint.every_seconds=3600",), [5, 10]),
    ],
)
def test_checkpoints_come_by_steps_by_seconds_and_at_the_end_of_an_epoch(
    tmp_path: Path, overrides: tuple[str, ...], expected: list[int]
) -> None:
    with workers(1, process_group=False) as group:
        group.run(train, tmp_path / "run", *overrides)
    assert saved_steps(tmp_path / "run") == expected


def test_two_workers_agree_that_the_time_for_a_checkpoint_has_come(tmp_path: Path) -> None:
    with workers(2, process_group=False) as group:
        group.run(train, tmp_path / "run", "checkpoint.every_seconds=1e-9")
    assert len(saved_steps(tmp_path / "run")) > 4


def test_training_goes_on_to_its_end_when_saves_fail_in_between(tmp_path: Path) -> None:
    fault = faults.fail(0, 28, at="checkpoint: tensors", step=2)
    with workers(1, faults=[fault], process_group=False) as group:
        group.run(train, tmp_path / "run", "checkpoint.every_steps=2")
    assert fault.happened
    records = list(read_journal(tmp_path / "run" / "journal.jsonl"))
    failed = [record for record in records if record.get("name") == "checkpoint-failed"]
    assert [(record["step"], "No space left" in record["error"]) for record in failed] == [(2, True)]
    assert saved_steps(tmp_path / "run") == [4, 5, 6, 8, 10]
