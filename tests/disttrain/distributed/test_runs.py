"""Lists of tensors cut into runs."""

from __future__ import annotations

import pytest
import torch

from disttrain.distributed import runs


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 10])
def test_runs_have_each_number_once_of_tensors_with_fewer_than_they_were_cut_for(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(runs, "_MOST_NUMBERS", {"cpu": 4})
    first, second = torch.arange(6).view(2, 3), torch.arange(size)
    found: list[list[int]] = [[], []]
    for run in runs.runs_of([6, 10], torch.device("cpu")):
        for segment, piece in zip(run, runs.cut([first, second], run), strict=True):
            found[segment.index] += piece.reshape(-1).tolist()
    assert found == [[*range(6)], [*range(size)]]
