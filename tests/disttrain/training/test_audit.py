"""A worker that computes or holds wrong bits: found, named, journalled, and kept out of the weights."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.checkpoint import CheckpointStore
from disttrain.parallel.exact.checksums import checksums
from disttrain.runs.journal import read_journal
from disttrain.testing import faults, run_workers
from disttrain.training import audit as audit_module
from disttrain.training.audit import Corruption, Plan, judge
from tests.disttrain.parallel.exact_runs import build, train


class WithNoise(nn.Module):
    """Computes something else each time, after the trial that exact mode makes before training."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build(3, (3, 32, 32))
        self.num_calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        scores: torch.Tensor = self.network(images)
        return scores * (1.0 + time.perf_counter_ns() % 997 / 997 * (self.num_calls > 4))


def refusal(run_dir: Path, noisy: bool = False) -> str:
    """Train with an audit of every second step; the error."""
    torch.manual_seed(0)
    model = WithNoise() if noisy else build(3, (3, 32, 32))
    try:
        train(run_dir, "parallel.audit_every_steps=2", "checkpoint.every_steps=1", model=model)
    except Corruption as error:
        return str(error)
    return "no corruption was found"


FLIP = faults.flip  # a bit of the first weight's gradient, or of the weight itself


@pytest.mark.parametrize(
    ("size", "fault", "words", "facts", "noisy"),
    [
        pytest.param(
            3,
            FLIP(1, "gradient", step=3, times=None),
            "rank 1 ({place}) computed '0.weight' of slice 1 in step 4 unlike the other workers, and computed it wrong",
            {"ranks": [1], "again": True, "slice": 1, "tensor": "'0.weight'"},
            False,
            id="the worker that serves the slice",
        ),
        pytest.param(
            3,
            FLIP(2, "gradient", step=3, count=9),
            "rank 2 ({place}) computed '0.weight' of slice 1 in step 4 unlike the other workers, and computed it right",
            {"ranks": [2], "again": False},
            False,
            id="the worker that checks it, once",
        ),
        pytest.param(
            2,
            FLIP(0, "gradient", step=3, count=8),
            "rank 0 ({place}) computed '0.weight' of slice 1 in step 4 unlike the other workers, and computed it right",
            {"ranks": [0], "compared_ranks": [0, 1]},
            False,
            id="of two, the one that has something else the next time",
        ),
        pytest.param(
            2,
            FLIP(0, "gradient", step=3, times=None),
            "rank 0 ({place}) and rank 1 ({place}) computed '0.weight' of slice 1 in step 4 differently: each computed "
            "the same again",
            {"ranks": []},
            False,
            id="of two, one that repeats itself",
        ),
        pytest.param(
            1,
            FLIP(0, "gradient", step=3, count=15),
            "rank 0 ({place}) got two results for '0.weight' of slice 1 in step 4: the code is not deterministic, or",
            {"ranks": [0]},
            False,
            id="a single one",
        ),
        pytest.param(
            3, None, "the code is not deterministic", {"ranks": []}, True, id="code that is not deterministic"
        ),
        pytest.param(
            3,
            FLIP(2, "weight", step=2),
            "after step 3 rank 2 ({place}) has other bits than the other workers in '0.weight'",
            {"what": "state", "ranks": [2]},
            False,
            id="a weight",
        ),
    ],
)
def test_wrong_bits_end_the_run_before_they_are_saved(
    tmp_path: Path, size: int, fault: Any, words: str, facts: dict[str, Any], noisy: bool
) -> None:
    errors = run_workers(
        refusal, size, args=(tmp_path, noisy), process_group=False, faults=[fault] if fault is not None else []
    )
    found = [record for record in read_journal(tmp_path / "journal.jsonl") if record.get("name") == "corruption"]
    assert len(found) == 1
    place = (found[0]["places"] or ["-"])[0]
    assert words.format(place=place) in errors[0]
    assert place.endswith(", cpu")
    assert errors == [errors[0]] * size
    assert {key: found[0][key] for key in facts} == facts
    saved = [path.name for path in CheckpointStore(tmp_path / "checkpoints").paths()]
    assert saved[-1] == f"step-{found[0]['step'] - 1:08}"


@pytest.mark.parametrize(
    ("first", "again", "ranks"),
    [
        pytest.param([(0, 7), (1, 8)], [7, 8, 7, 7], [1], id="it repeats what is wrong"),
        pytest.param([(0, 8), (1, 7)], [7, 7, 7, 7], [0], id="it does not"),
        pytest.param([(2, 8), (3, 9)], [7, 7, 8, 9], [], id="too many"),
        pytest.param([(0, 8), (1, 7)], [7, 7, 7, 9], [], id="another one the second time"),
        pytest.param([(0, 7), (1, 8)], [7, 7], [1], id="of two, once"),
        pytest.param([(0, 7), (1, 8)], [7, 9], [1], id="of two, each time something else"),
        pytest.param([(0, 7), (1, 8)], [7, 8], [], id="of two, repeated"),
        pytest.param([(0, 7), (1, 8)], [5, 6], [], id="of two, both something else"),
    ],
)
def test_only_who_is_alone_with_its_result_is_named(
    first: list[tuple[int, int]], again: list[int], ranks: list[int]
) -> None:
    assert judge(first, again).ranks == ranks


@pytest.mark.parametrize(
    ("first", "ranks", "words"),
    [
        pytest.param([5, 6, 5], [1], "rank 1 (here) computed another checksum than the other workers", id="of three"),
        pytest.param([5, 6], [], "rank 0 (here) and rank 1 (here) computed different checksums", id="of two"),
    ],
)
def test_a_checksum_of_the_state_that_is_wrong_once_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, first: list[int], ranks: list[int], words: str
) -> None:
    monkeypatch.setattr(audit_module, "_state", lambda job: {"weight": 5})
    monkeypatch.setattr(audit_module, "_place", lambda job: "here")
    monkeypatch.setattr(audit_module, "gather_objects", lambda own: [own] * len(first))
    error = audit_module._drift(SimpleNamespace(step=4), first)  # type: ignore[arg-type]
    assert words in str(error)
    assert "the same one the second time: a passing fault" in str(error)
    assert (error.facts["ranks"], error.facts["again"]) == (ranks, False)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_in_time_each_slice_is_computed_by_every_other_worker(size: int) -> None:
    plans = [Plan.of(number, 4, 4, size) for number in range(4 * (size - 1))]
    assert len({(plan.slice_index, plan.second) for plan in plans}) == len(plans)
    assert all(plan.owner != plan.second for plan in plans)


def test_any_flipped_bit_shows_and_so_does_another_order() -> None:
    numbers = torch.randn(300_000)  # more than are worked on at once
    (before,) = checksums([numbers])
    words = numbers.view(torch.int32)
    for place, bit in [(0, 0), (5, 31), (270_000, 31), (299_999, 30)]:
        words[place] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert checksums([numbers]) != [before]
        words[place] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert checksums([numbers.flip(0), numbers]) == [checksums([numbers.flip(0)])[0], before]
    assert checksums([numbers.flip(0)]) != [before]
    kinds = [torch.ones(3, dtype=kind) for kind in (torch.bool, torch.bfloat16, torch.float64, torch.complex64)]
    assert 0 not in checksums([*kinds, torch.ones(())])
    assert checksums([None, torch.zeros(0)]) == [0, 0]
