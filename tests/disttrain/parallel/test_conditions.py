"""What the bits of a run depend on besides its recipe: set for exact mode, and compared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from disttrain.parallel.conditions import differences, environment_fingerprint, exact_conditions, unlike_the_first
from disttrain.recipe import load_recipe
from tests.disttrain.parallel.exact_runs import train


def test_the_conditions_are_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads = torch.get_num_threads()
    before = environment_fingerprint(torch.device("cpu"))
    with exact_conditions(load_recipe("digits", ["parallel.exact=true", "train.threads=3"])):
        inside = environment_fingerprint(torch.device("cpu"))
        assert (inside["threads"], inside["deterministic"]) == (3, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with exact_conditions(load_recipe("digits", ["parallel.exact=true"])):
        assert torch.get_num_threads() == 1  # not the cores' share, which would follow from the number of workers
    assert environment_fingerprint(torch.device("cpu")) == before
    assert torch.get_num_threads() == threads
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_differences_in_what_the_bits_rest_on_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "train.max_steps=2")
    train(tmp_path, "train.max_steps=4", "train.threads=2")
    assert "threads was 1, now 2; the bits may differ" in capsys.readouterr().err
    assert differences({"torch": "2.11", "old": 1}, {"torch": "2.12", "new": 2}) == ["torch was 2.11, now 2.12"]
    facts = [{"cpu": "AVX512", "threads": 1}, {"cpu": "AVX512", "threads": 1}, {"cpu": "AVX2", "threads": 1}]
    assert unlike_the_first(facts) == ["cpu is AVX512 on rank 0 and AVX2 on rank 2"]
    assert unlike_the_first(facts[:2]) == []


def test_the_fingerprint_tells_processors_and_kernels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ONEDNN_MAX_CPU_ISA=AVX2`, or a CPU without avx512_bf16, gives other bits; a key seen first is not reported."""
    cpu = torch.device("cpu")
    for noise in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_VERBOSE"):  # they follow from the world, or say nothing
        monkeypatch.setenv(noise, "1")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = environment_fingerprint(cpu)
    assert before["cpu"]
    assert all(noise not in before["variables"] for noise in ("NUM_THREADS", "VERBOSE"))
    for name, value in (("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_CBWR", "COMPATIBLE"), ("ATEN_CPU_CAPABILITY", "avx2")):
        monkeypatch.setenv(name, value)
        now = environment_fingerprint(cpu)
        assert differences(before, now) == [f"variables was without, now with {name}={value}"]
        assert unlike_the_first([now, before]) == [f"variables is with {name}={value} on rank 0 and without on rank 1"]
        monkeypatch.delenv(name)
    older = {**before, "cpu": "another", "cpu_flags": f"{before['cpu_flags']} amx_bf16"}
    assert differences(older, before) == [
        f"cpu was another, now {before['cpu']}",
        "cpu_flags was with amx_bf16, now without",
    ]
    of_an_old_checkpoint = {"torch": before["torch"], "threads": before["threads"]}
    assert differences(of_an_old_checkpoint, before) == []
