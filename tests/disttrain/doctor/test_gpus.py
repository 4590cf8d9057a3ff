"""What the doctor says of GPUs, with a driver and a PyTorch that are made up: none is needed here."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from disttrain.doctor import gpus


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Four GPUs, of which the second is in use; the result lists the all-reduces that were tried."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_seen_by_torch", lambda: [["Some GPU"] * 4, "13.0", "NCCL 2.28"])
    monkeypatch.setattr(gpus, "installed_gpus", lambda: 4)
    nvml, nothing = ModuleType("pynvml"), 2**31 - 1
    on_second = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**29),
        SimpleNamespace(pid=nothing, usedGpuMemory=None),
    ]
    functions = {
        "NVMLError": RuntimeError, "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 4,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: on_second if gpu == 1 else [],
    }  # fmt: skip
    for name, function in functions.items():
        setattr(nvml, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    tried: list[tuple[str, int]] = []
    monkeypatch.setattr(gpus, "all_reduced", lambda device, size: tried.append((device, size)))
    return tried


def test_all_gpus_add_a_tensor_and_who_uses_them_is_named(four_gpus: list[tuple[str, int]]) -> None:
    seen, in_use, nccl = gpus.gpus()
    assert (seen.status, in_use.status, nccl.status) == ("ok", "warning", "ok")
    assert f"(process {os.getpid()}, 1.5 GiB) on GPU 1; a program (process {2**31 - 1}) on GPU 1" in in_use.detail
    assert four_gpus == [("cuda", 4)]
    assert "4 GPUs added" in nccl.detail


def test_an_nvml_that_fails_is_no_finding(four_gpus: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", fails)
    assert [finding.name for finding in gpus.gpus()] == ["gpus", "nccl"]


@pytest.mark.parametrize(("visible", "status"), [("7", "failure"), ("0,0", "failure"), ("", "ok"), ("-1", "ok")])
def test_a_variable_that_hides_all_gpus_is_named_unless_it_says_so(
    visible: str, status: str, four_gpus: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_seen_by_torch", lambda: [[], "13.0", "NCCL 2.28"])
    monkeypatch.setattr(gpus, "count_gpus", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = gpus.gpus()
    assert finding.status == status
    assert status == "ok" or finding.detail.startswith(f"CUDA_VISIBLE_DEVICES='{visible}' names none of the 4")
    assert four_gpus == []
