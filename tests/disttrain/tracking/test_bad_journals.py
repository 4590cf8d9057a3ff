"""Journals and delivery states that something has changed: what is good in them still counts, and still arrives."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

from disttrain.runs.journal import Journal, read_journal
from disttrain.runs.summary import summarise
from disttrain.tracking import backlog_of, load_state
from disttrain.tracking.mlflow.delivery import Delivery
from tests.disttrain.mutations import mutated_bytes, mutated_json
from tests.disttrain.tracking.mlflow.test_delivery import the_run

STATE = {
    "uri": "http://127.0.0.1:1", "experiment": "e", "experiment_id": "1", "run_id": "a", "offset": 10,
    "uploads": [{"kind": "artifact", "path": "recipe.toml"}], "status": {"status": "FINISHED", "time": 1.0},
    "files": {"recipe.toml": "ab"},
}  # fmt: skip


def a_journal(run_dir: Path) -> bytes:
    journal = Journal(run_dir / "journal.jsonl")
    journal.params({"optim.lr": 0.1})
    for step in range(5):
        journal.metrics(step, {"train/loss": 1.0})
    journal.append("status", status="FINISHED")
    journal.close()
    return (run_dir / "journal.jsonl").read_bytes()


def test_mutated_journals_and_states(run_dir: Path) -> None:
    good = a_journal(run_dir)
    (run_dir / "checkpoints").mkdir()
    for seed in range(300):
        chance = random.Random(seed)
        lines = good.splitlines(keepends=True)
        if chance.randrange(2):
            number = chance.randrange(len(lines))
            lines[number] = json.dumps(mutated_json(json.loads(lines[number]), chance)).encode() + b"\n"
            changed = b"".join(lines)
        else:
            changed = mutated_bytes(good, chance)
        (run_dir / "journal.jsonl").write_bytes(changed)
        state = json.dumps(mutated_json(STATE, chance)).encode()
        (run_dir / "mlflow.json").write_bytes(state if chance.randrange(3) else mutated_bytes(state, chance))
        before = (run_dir / "mlflow.json").read_bytes()
        try:
            summary = summarise(run_dir)
            assert summary["state"] in ("finished", "unfinished", "new")
            json.dumps(summary)
            for record in read_journal(run_dir / "journal.jsonl"):
                assert isinstance(record["kind"], str)
            assert backlog_of(run_dir).records <= len(changed)
            assert load_state(run_dir).offset >= 0
            assert (run_dir / "journal.jsonl").read_bytes() == changed
            assert (run_dir / "mlflow.json").read_bytes() == before
            journal = Journal(run_dir / "journal.jsonl")  # a restart resumes from what is whole
            journal.metrics(100, {"not/there/before": 2.0})
            journal.close()
            last = list(read_journal(run_dir / "journal.jsonl"))[-1]
            assert (last["step"], last["metrics"]) == (100, {"not/there/before": 2.0})
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


def test_looking_at_a_long_run_takes_no_memory_for_it(run_dir: Path) -> None:
    good = a_journal(run_dir)
    line = json.dumps({"time": 1.0, "kind": "metrics", "step": 1, "metrics": {"train/loss": 1.0}}).encode() + b"\n"
    (run_dir / "journal.jsonl").write_bytes(good + 100_000 * line)
    tracemalloc.start()
    try:
        assert summarise(run_dir)["state"] == "finished"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_hostile_records_hold_up_nothing(server: Any, run_dir: Path) -> None:
    journal = Journal(run_dir / "journal.jsonl")
    for record in (
        {"kind": "metrics", "step": 2**70, "metrics": {"huge": 1}},
        {"kind": "metrics", "step": 1, "time": "noon", "metrics": {"late": 1}},
        {"kind": "metrics", "step": 1, "time": 1e300, "metrics": {"later": 1}},
        {"kind": "params", "params": {"deep": {"a": [1]}, "": 1}},
        {"kind": "status", "status": "DANCING"},
        {"kind": "artifact", "path": ""},
        {"kind": "artifact", "path": "journal.jsonl", "artifact_path": "../../elsewhere"},
        {"kind": "artifact", "path": "x" * 5000},
        {"kind": "model", "path": "journal.jsonl", "step": "many"},
    ):
        journal.append(**record)
    journal.metrics(7, {"good": 1.0})
    journal.close()
    said: list[str] = []
    Delivery(run_dir, server.uri, "tests", run_dir.name, said.append).deliver()
    assert not backlog_of(run_dir)
    run = the_run(server.uri, run_dir)
    assert run.data.metrics == {"late": 1.0, "later": 1.0, "good": 1.0}
    assert run.info.status == "RUNNING"
    assert len(said) >= 4
