"""Exact mode with a compiled model, by torch's own compiler and kernels: the same bits whoever computes what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.testing import run_workers
from tests.disttrain.parallel.exact_runs import build, outcome, train


class Compiled(nn.Module):
    """Of a class of its own: torch 2.11 compiles no other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = build(3, (3, 32, 32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3)."""
        scores: torch.Tensor = self.inner(images)
        return scores


def compiled(run_dir: Path, cache: Path, *overrides: str) -> int:
    """Train it; how many kernels torch has made of it by now."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    train(run_dir, "train.compile=true", "train.precision=bf16", *overrides, model=Compiled())
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.long
def test_the_bits_do_not_depend_on_who_has_compiled_what(tmp_path: Path) -> None:
    """One to three workers, which meet other sizes first; and a run that two begin and three end, without a cache."""
    first = tmp_path / "cache"
    assert compiled_by(1, tmp_path / "1", first) > 1
    for size in (2, 3):
        compiled_by(size, tmp_path / str(size), first)
    compiled_by(2, tmp_path / "resumed", tmp_path / "another-cache", "train.max_steps=6")
    compiled_by(3, tmp_path / "resumed", first)
    whole = outcome(tmp_path / "1")
    for run in ("2", "3", "resumed"):
        found = outcome(tmp_path / run)
        assert (found.weights, found.optimizer) == (whole.weights, whole.optimizer), run
        assert found.metrics.items() >= whole.metrics.items(), run  # a run that ends early is evaluated there, too
    train(tmp_path / "not compiled", "train.precision=bf16", model=Compiled())
    assert outcome(tmp_path / "not compiled").weights != whole.weights, "the test shows nothing: nothing was compiled"


def compiled_by(size: int, run_dir: Path, cache: Path, *overrides: str) -> int:
    """How many kernels the first of so many workers has made."""
    arguments = (run_dir, cache, *overrides)
    found: list[int] = run_workers(compiled, size, timeout_s=600, args=arguments, process_group=False)
    return found[0]
