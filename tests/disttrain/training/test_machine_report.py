"""What machines and GPUs come to, with GPUs that are made up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disttrain.distributed.world import World
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.tracking import SystemSampler
from disttrain.training import machine_report
from disttrain.training.machine_report import MachineReport
from tests.disttrain.parallel.exact_runs import train

PEAK = "system/rank-{}/gpu_memory_peak_gib"


class Sampler(SystemSampler):
    def __init__(self) -> None:
        pass

    def latest(self) -> list[float]:
        return [1.0, *[math.nan] * 7, 2.0]


def made_up(monkeypatch: pytest.MonkeyPatch, shortages: Iterator[int]) -> None:
    monkeypatch.setattr(machine_report, "has_gpu", lambda world: True)
    monkeypatch.setattr(machine_report, "gpu_memory", lambda world: (world.rank + 0.5, next(shortages)))


@pytest.mark.parametrize("exact", [True, False])
def test_each_rank_reports_its_gpu_and_one_of_each_machine_the_rest(
    monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    made_up(monkeypatch, iter([3, 0, 3, 2]))  # at the start of both ranks, and at the first report
    recipe = load_recipe("digits", [f"parallel.exact={str(exact).lower()}"])
    worlds = [World(rank, rank, 2, 2, torch.device("cpu"), "here") for rank in range(2)]
    reports = [MachineReport(worlds[0], recipe, Sampler()), MachineReport(worlds[1], recipe, None)]
    summed = torch.stack([report.mine() for report in reports]).sum(dim=0).tolist()
    expected = {"system/node-0/cpu_percent": 1.0, "system/node-0/gpu_memory_used_gib": 2.0}
    for report in reports:
        assert report.metrics(summed) == {**expected, PEAK.format(0): 0.5, PEAK.format(1): 1.5}
        assert report.short_of_memory(summed) == ([1] if exact else [])


def test_a_kernel_that_found_no_memory_is_a_warning_in_exact_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(monkeypatch, iter([0, 0, 1, 1]))
    train(tmp_path / "run", "train.max_steps=3", "tracking.system_metrics=true", "parallel.slices=2")
    assert capsys.readouterr().err.count("rank 0: the GPU had no memory for some kernels, and others were used") == 1
    records = list(read_journal(tmp_path / "run" / "journal.jsonl"))
    assert [record["step"] for record in records if record.get("name") == "short-of-memory"] == [2]
    peaks = [record["metrics"][PEAK.format(0)] for record in records if PEAK.format(0) in record.get("metrics", {})]
    assert peaks == [0.5] * 3
