"""What the bits of a run depend on besides its recipe: set for exact mode, and compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import ConfigurationError
from disttrain.parallel import conditions
from disttrain.parallel.conditions import (
    differences,
    environment_fingerprint,
    exact_conditions,
    sums_in_fixed_order,
    unlike_the_first,
)
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


@pytest.fixture
def as_in_a_new_process() -> Iterator[None]:
    """How products of float32 numbers are rounded, by all of torch's names for it, before and after the test."""

    def fresh() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for name in ("cuda", "mkldnn"):
            getattr(torch.backends, name).matmul.fp32_precision = "none"

    fresh()
    yield
    fresh()


def how_products_are_rounded() -> tuple[Any, ...]:
    backends: Any = torch.backends
    matmul, cudnn, cpu = backends.cuda.matmul, backends.cudnn, backends.mkldnn.matmul
    older = (torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32)  # which the compiler asks
    return *older, *(one.fp32_precision for one in (matmul, cudnn.conv, cudnn.rnn, cpu)), cudnn.benchmark


@pytest.mark.parametrize("by_the_program", ["", "highest", "high", "medium"])
@pytest.mark.usefixtures("as_in_a_new_process")
def test_products_and_cudnn_are_as_the_recipe_has_them_and_put_back(by_the_program: str) -> None:
    """Whatever the program around has set: torch refuses to answer where GPUs' and CPUs' products are out of step."""
    if by_the_program:
        torch.set_float32_matmul_precision(by_the_program)
    before = how_products_are_rounded()
    for tf32 in (True, False):
        with exact_conditions(load_recipe("digits", [f"train.tf32={str(tf32).lower()}"])):
            precision, matmul, cudnn, *newer, on_cpus, benchmark = how_products_are_rounded()
            assert (precision, matmul, cudnn, benchmark) == ("high" if tf32 else "highest", tf32, tf32, True)
            assert [one == "tf32" for one in newer] == [tf32] * 3
            assert (on_cpus == "tf32") is (tf32 and by_the_program in ("high", "medium")), "a key of GPUs"
        assert how_products_are_rounded() == before
    with exact_conditions(load_recipe("digits", ["train.deterministic=true", "train.tf32=true"])):
        assert how_products_are_rounded()[1:3] == (True, True)
        assert torch.backends.cudnn.benchmark is False
    assert how_products_are_rounded() == before


@pytest.mark.usefixtures("as_in_a_new_process")
def test_products_that_were_set_by_torchs_newer_names_are_put_back() -> None:
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    with exact_conditions(load_recipe("digits", ["train.tf32=false"])):
        assert how_products_are_rounded()[:2] == ("highest", False)
    assert (backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision) == ("tf32", "none")


@pytest.mark.usefixtures("as_in_a_new_process")
def test_convolutions_are_not_rounded_by_what_the_program_has_set_for_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    with exact_conditions(load_recipe("digits", ["train.tf32=false"])):
        assert "tf32" not in how_products_are_rounded()
        assert True not in how_products_are_rounded()[:3]


def test_a_compiler_that_is_there_is_to_be_deterministic_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(config, "deterministic", False)
    with exact_conditions(load_recipe("digits", ["train.deterministic=true"])):
        assert config.deterministic is torch.are_deterministic_algorithms_enabled() is True
    assert config.deterministic is torch.are_deterministic_algorithms_enabled() is False


def test_fast_mode_can_be_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    threads = torch.get_num_threads()
    recipe = load_recipe("digits", ["train.deterministic=true"])
    with sums_in_fixed_order(recipe), exact_conditions(recipe):
        inside = environment_fingerprint(torch.device("cpu"))
        assert (inside["deterministic"], inside["threads"]) == (True, threads), "of threads only the number matters"
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "NCCL_NVLS_ENABLE" not in os.environ
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    with sums_in_fixed_order(recipe):
        assert os.environ["NCCL_NVLS_ENABLE"] == "1"
    plain = ("parallel.exact=false", "train.deterministic=true", "train.max_steps=1")
    with pytest.raises(ConfigurationError, match=r"has no deterministic kernel on cpu: .* train.deterministic = false"):
        train(tmp_path, *plain, model=Unpools())


class Unpools(nn.Module):
    """What has no deterministic kernel even on CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled, places = nn.functional.max_pool2d(images, 2, return_indices=True)
        scores: torch.Tensor = self.linear(nn.functional.max_unpool2d(pooled, places, 2).flatten(1))
        return scores


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
    noises = (
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_VERBOSE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_FX_GRAPH_CACHE",
    )  # fmt: skip
    for noise in noises:  # they follow from the world, or say nothing
        monkeypatch.setenv(noise, "1")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = environment_fingerprint(cpu)
    assert before["cpu"]
    assert all(noise not in before["variables"] for noise in noises)
    for name, value in (
        ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_CBWR", "COMPATIBLE"), ("ATEN_CPU_CAPABILITY", "avx2"),
        ("TORCHINDUCTOR_FREEZING", "1"), ("TRITON_F32_DEFAULT", "tf32"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
        now = environment_fingerprint(cpu)
        assert differences(before, now) == [f"variables was without, now with {name}={value}"]
        assert unlike_the_first([now, before]) == [f"variables is with {name}={value} on rank 0 and without on rank 1"]
        monkeypatch.delenv(name)
    older = {**before, "cpu": "another", "cpu_flags": f"{before['cpu_flags']} avx_of_another"}
    assert differences(older, before) == [
        f"cpu was another, now {before['cpu']}",
        "cpu_flags was with avx_of_another, now without",
    ]
    of_an_old_checkpoint = {"torch": before["torch"], "threads": before["threads"]}
    assert differences(of_an_old_checkpoint, before) == []


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Have torch describe a GPU. What it yields are its memory's numbers, which can be changed."""
    properties, memory = SimpleNamespace(multi_processor_count=132, major=9, minor=0), {"allocation.all.allocated": 0}
    for name, value in {
        "is_initialized": True, "device_count": 1, "get_device_name": "H100", "get_device_properties": properties,
        "memory_stats": memory,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    conditions._read_by_cublas_before.cache_clear()
    yield memory
    conditions._read_by_cublas_before.cache_clear()


def test_the_fingerprint_of_a_gpu_has_what_chooses_its_kernels(
    a_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    before = environment_fingerprint(gpu)
    assert (before["gpu"], before["sms"]) == ("H100", 132)
    assert {"cudnn", "cuda", "cublas_workspace"} <= before.keys()
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1)
    was_flash, was = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert differences(before, environment_fingerprint(gpu)) == [
            "attention was with flash, now without",
            f"float32_precision was with matmul={was}, now with matmul=tf32",
            f"cudnn was {before['cudnn']}, now 1",
        ]
    finally:
        torch.backends.cuda.enable_flash_sdp(was_flash)
        torch.backends.cuda.matmul.fp32_precision = was
    older = {name: before[name] for name in ("torch", "gpu", "cuda", "cublas_workspace")}
    assert differences(older, before) == []


def test_a_workspace_that_cublas_cannot_have_read_is_not_recorded(
    a_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    exact = load_recipe("digits", ["parallel.exact=true"])

    def recorded() -> object:
        with exact_conditions(exact):
            return environment_fingerprint(torch.device("cuda", 0))["cublas_workspace"]

    assert recorded() == ":4096:8"
    a_gpu["allocation.all.allocated"] = 5  # by the run before, which set it in time
    assert recorded() == ":4096:8"
    conditions._read_by_cublas_before.cache_clear()
    assert recorded() is None
    conditions._read_by_cublas_before.cache_clear()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert recorded() == ":16:8"
