"""From the last step to the prompt: whatever interrupts a run there, the next start finishes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.runs.journal import Journal
from disttrain.runs.summary import summarise
from disttrain.terminal.console import Console
from disttrain.testing import faults, workers
from disttrain.testing.faults import Fault
from disttrain.testing.group import Outcome
from disttrain.tracking import last_status, read_journal
from disttrain.training.conclusion import waiting_aloud
from tests.disttrain.parallel.exact_runs import outcome, train

LAST_STEP = 4
CONCLUSION = [f"conclusion: {stage}" for stage in ("begun", "exported", "written", "delivered")]
MOMENTS = ["evaluation", "checkpoint: tensors", "checkpoint: named", *CONCLUSION]


def job(run_dir: Path) -> None:
    train(run_dir, "train.epochs=1", "parallel.exact=false")


def attempt(run_dir: Path, *injuries: Fault, size: int = 1) -> list[Outcome]:
    with workers(size, faults=injuries, process_group=False, check_collectives=False, timeout_s=240) as group:
        return group.attempt(job, run_dir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [of_rank.state for of_rank in attempt(run_dir)] == ["returned"]
    return run_dir


@pytest.mark.parametrize("moment", [{"step": LAST_STEP}, *({"at": name} for name in MOMENTS)], ids=str)
def test_a_run_killed_after_its_last_step_is_finished_by_the_next_start(
    tmp_path: Path, undisturbed: Path, moment: dict[str, int | str]
) -> None:
    run_dir = tmp_path / "run"
    killed = faults.kill(0, **moment)
    attempt(run_dir, killed)
    assert killed.happened
    was_finished = last_status(run_dir / "journal.jsonl") == "FINISHED"
    assert was_finished == (moment.get("at") in CONCLUSION[2:])
    for _ in range(2):
        assert [of_rank.state for of_rank in attempt(run_dir)] == ["returned"]
    assert summarise(run_dir)["state"] == "finished"
    assert outcome(run_dir) == outcome(undisturbed)
    events = [record["name"] for record in read_journal(run_dir / "journal.jsonl") if record["kind"] == "event"]
    assert (events.count("finished"), events[-1]) == (1, "finished")
    log = (run_dir / "logs" / "worker-0.log").read_text()
    assert log.count("is already finished: 5 of 5 steps") == 1 + was_finished
    assert log.count("was interrupted after its last step: finishing it") == (
        moment.get("at") in (*CONCLUSION[:2], "checkpoint: named")
    )


def test_a_long_wait_for_mlflow_is_not_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(tmp_path / "journal.jsonl").metrics(1, {"loss": 1.0})
    console = Console(speaks=True)
    assert not waiting_aloud(console, tmp_path, "runs/one")()
    assert capsys.readouterr().out == "", "it has only begun"
    for name in ("_SILENCE_S", "_SAY_EVERY_S"):
        monkeypatch.setattr(f"disttrain.training.conclusion.{name}", 0.0)
    waiting = waiting_aloud(console, tmp_path, "runs/one")
    assert not any(waiting() for _ in range(3))
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "waiting until MLflow has everything (Ctrl-C leaves the rest to `disttrain sync runs/one`)"
    assert others == ["MLflow still lacks 2 journal records"] * 2


def test_a_request_to_stop_after_the_last_step_lets_the_run_finish(tmp_path: Path, undisturbed: Path) -> None:
    injuries = [faults.terminate(rank, at=moment) for rank, moment in ((0, "conclusion: exported"), (1, "evaluation"))]
    assert [of_rank.state for of_rank in attempt(tmp_path / "run", *injuries, size=2)] == ["returned"] * 2
    assert injuries[0].happened
    assert summarise(tmp_path / "run")["state"] == "finished"
