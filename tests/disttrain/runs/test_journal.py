from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.runs.journal import Journal, count_records, read_journal, read_records

numbers = st.floats(allow_nan=True, allow_infinity=True)
names = st.text(min_size=1, max_size=12)
plain = st.none() | st.booleans() | st.integers() | numbers | st.text()
written = st.one_of(
    st.tuples(st.just("metrics"), st.integers(0, 10**9), st.dictionaries(names, numbers, min_size=1, max_size=4)),
    st.tuples(st.just("params"), st.dictionaries(names, plain | st.lists(plain, max_size=3), min_size=1, max_size=4)),
    st.tuples(st.just("tags"), st.dictionaries(names, st.text(), min_size=1, max_size=4)),
    st.tuples(st.just("event"), st.text(max_size=10)),
)


def write(journal: Journal, record: tuple[Any, ...]) -> None:
    getattr(journal, record[0])(*record[1:])


def contents(path: Path) -> list[str]:
    """Records as text, in which NaN equals NaN."""
    return [repr(record) for record in read_journal(path)]


def metrics_of(path: Path) -> list[tuple[int, str, float]]:
    return [
        (record["step"], name, value)
        for record in read_journal(path)
        if record["kind"] == "metrics"
        for name, value in record["metrics"].items()
    ]


@settings(max_examples=60)
@given(st.lists(written, min_size=1, max_size=8), st.integers(0, 2**31))
def test_torn_at_any_byte_loses_at_most_the_torn_record(records: list[tuple[Any, ...]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal.jsonl")
        journal = Journal(path)
        for record in records:
            write(journal, record)
        journal.close()
        whole, before = path.read_bytes(), contents(path)
        size = cut % (len(whole) + 1)
        path.write_bytes(whole[:size])

        Journal(path).close()

        after = contents(path)
        complete = whole[:size].count(b"\n")
        assert path.read_bytes().endswith(b"\n")
        if complete == 0 and after[:1] != before[:1]:  # the first line, which names the job, was torn: a new journal
            assert len(after) == 1
        else:
            assert after == before[: len(after)]
            assert len(after) in (complete, complete + 1)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abc"), st.booleans()), max_size=40))
def test_no_key_and_step_is_ever_written_twice(rows: list[tuple[int, str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal.jsonl")
        journal = Journal(path)
        for step, name, restart in rows:
            if restart:
                journal.close()
                journal = Journal(path)
            journal.metrics(step, {name: 1.0})
        journal.close()
        kept = [(step, name) for step, name, _ in metrics_of(path)]
        assert len(kept) == len(set(kept))
        assert {name for _, name in kept} == {name for _, name, _ in rows}


def test_steps_repeated_after_a_restart_count_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in (10, 20, 30):
        journal.metrics(step, {"train/loss": float(step)})
    journal.metrics(30, {"eval/loss": 3.0})
    journal.close()
    journal = Journal(path)
    for step in (20, 30, 40):
        journal.metrics(step, {"train/loss": -1.0, "eval/loss": -1.0})
    journal.close()
    assert [(step, value) for step, name, value in metrics_of(path) if name == "train/loss"] == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.0),
        (40, -1.0),
    ]
    evaluated = [(step, value) for step, name, value in metrics_of(path) if name == "eval/loss"]
    assert evaluated == [(30, 3.0), (20, -1.0), (40, -1.0)]


@pytest.mark.parametrize("damaged", [2, 3])
def test_one_wrong_digit_in_a_step_mutes_no_metric(tmp_path: Path, damaged: int) -> None:
    """In the midst of the steps, and in the last one."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in (101, 102, 103):
        journal.metrics(step, {"train/loss": float(step)})
    journal.close()
    path.write_text(path.read_text().replace(f'"step": 10{damaged}', f'"step": 90{damaged}'))
    journal = Journal(path, first_step=101)  # the checkpoint of step 101 is the newest
    for step in (102, 103, 104, 105):
        journal.metrics(step, {"train/loss": float(step)})
    journal.close()
    steps = sorted(step for step, _, _ in metrics_of(path))
    assert steps == [101, 102, 103, 104, 105, 900 + damaged]


def test_values_that_json_cannot_hold_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 5e-324, "e": 0.1})
    journal.params({"nan": math.nan, "list": [math.inf, {"x": -math.inf}], "path": Path("x")})
    journal.event("spike", loss=math.nan)
    journal.close()
    for text in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    values = {name: value for _, name, value in metrics_of(tmp_path / "journal.jsonl")}
    assert math.isnan(values.pop("a"))
    assert values == {"b": math.inf, "c": -math.inf, "d": 5e-324, "e": 0.1}


def test_unchanged_parameters_and_tags_are_written_once(tmp_path: Path) -> None:
    for epochs in (1, 1, 2):
        journal = Journal(tmp_path / "journal.jsonl")
        journal.params({"lr": 0.1, "milestones": (1, 2), "epochs": epochs, "eps": math.nan})
        journal.tags({"world_size": "2"})
        journal.close()
    records = [record for record in read_journal(tmp_path / "journal.jsonl") if record["kind"] in ("params", "tags")]
    assert [record.get("params", record.get("tags")) for record in records] == [
        {"lr": 0.1, "milestones": [1, 2], "epochs": 1, "eps": "NaN"},
        {"world_size": "2"},
        {"epochs": 2},
    ]


def test_the_job_keeps_its_name(tmp_path: Path) -> None:
    jobs = []
    for _ in range(2):
        Journal(tmp_path / "journal.jsonl").close()
        jobs.append(next(read_journal(tmp_path / "journal.jsonl"))["job"])
    assert jobs[0] == jobs[1]
    assert count_records(tmp_path / "journal.jsonl", 0) == 1


@pytest.mark.parametrize("rubbish", [b"\0" * 64, b"{}", b"[1]", b'{"kind": 3}', b'{"kind": "metrics"}', b"\xff\xfe"])
def test_damaged_lines_are_skipped(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.metrics(1, {"a": 1.0})
    journal.close()
    with open(path, "ab") as file:
        file.write(rubbish + b"\n")
    journal = Journal(path)
    journal.metrics(2, {"a": 2.0})
    journal.close()
    assert metrics_of(path) == [(1, "a", 1.0), (2, "a", 2.0)]
    assert [offset for _, offset in read_records(path, 0)][-1] == path.stat().st_size


def test_a_killed_writer_loses_nothing_it_has_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys; from disttrain.runs.journal import Journal; j = Journal(sys.argv[1])\n"
        "for step in range(10**9): j.metrics(step, {'loss': 1.0}); print(step, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        last = -1
        while last < 200:
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = [int(text) for text in writer.stdout.read().split("\n")[:-1]]
    steps = [step for step, _, _ in metrics_of(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > max([last, *rest])


@pytest.mark.skipif(
    not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs a small tmpfs, so Linux and root"
)
def test_a_full_disk_neither_tears_the_file_nor_loses_records(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        ballast = small / "ballast"
        ballast.write_bytes(b"x" * 40960)
        journal = Journal(small / "journal.jsonl")
        refused = 0
        for step in range(400):
            try:
                journal.metrics(step, {"a_metric_with_a_rather_long_name": 1.0})
            except OSError:
                refused += 1
        assert refused
        assert (small / "journal.jsonl").read_bytes().endswith(b"\n")
        ballast.unlink()
        journal.metrics(400, {"a_metric_with_a_rather_long_name": 1.0})
        journal.close()
        assert [step for step, _, _ in metrics_of(small / "journal.jsonl")] == list(range(401))
    finally:
        subprocess.run(["umount", small], check=True)


def test_passwords_never_reach_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    uri = "postgresql://user:s3cr:t@pass@db.example/x?password=s3cr:t&a=1"
    journal.params({"uri": uri, "deep": {"uri": [uri]}})
    journal.tags({"from": uri})
    journal.event("failed", message=f"cannot reach {uri}: no route")
    journal.close()
    text = (tmp_path / "journal.jsonl").read_text()
    assert "s3cr" not in text
    assert "user" not in text
    assert text.count("postgresql://***@db.example/x?password=***&a=1") == 4


def test_a_metric_costs_microseconds(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    values = {f"train/metric_{i}": 0.123456789 for i in range(5)}
    costs = []
    for step in range(2000):
        begin = time.perf_counter()
        journal.metrics(step, values)
        costs.append(time.perf_counter() - begin)
    journal.close()
    assert sorted(costs)[len(costs) // 2] < 200e-6  # some 15 on an idle machine
