from __future__ import annotations

import math
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from disttrain.tracking import system
from disttrain.tracking.system import SYSTEM_METRICS, SystemSampler, node_metrics


def test_samples_this_machine() -> None:
    with SystemSampler(interval_s=0.05) as sampler:
        assert len(sampler.latest()) == len(sampler.names)
        deadline = time.monotonic() + 240
        while math.isnan(sampler.latest()[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        values = dict(zip(sampler.names, sampler.latest(), strict=True))
    assert 0 <= values["cpu_percent"] <= 100
    assert 0 < values["memory_percent"] < 100
    assert values["memory_used_gib"] > 0
    assert values["network_sent_mib_per_s"] >= 0
    assert not any(thread.name == "disttrain-system" for thread in threading.enumerate())


def test_gpus_are_sampled_where_nvidias_module_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # tests hide all GPUs
    nvml = ModuleType("pynvml")
    answers = {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2**30),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(nvml, name, lambda *_, answer=answer: answer)
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with SystemSampler(interval_s=0.05) as sampler:
        deadline = time.monotonic() + 240
        while math.isnan(sampler.latest()[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        values = dict(zip(sampler.names, sampler.latest(), strict=True))
    assert (values["gpu_percent"], values["gpu_memory_used_gib"]) == (50, 2)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-b, GPU-a1", [1, 0]),
        ("MIG-part,1", ["MIG-part"]),
        ("1,1", []),
        ("1,7,0", [1]),
        ("-1", []),
    ],
)
def test_only_gpus_that_cuda_shows_are_sampled(visible: str | None, expected: list[int | str]) -> None:
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUUID=lambda index: ["GPU-a1b2", b"GPU-b3c4", "GPU-c5d6"][index],
    )
    assert system.visible_gpus(nvml, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_closing_does_not_wait_for_the_next_sample() -> None:
    begin = time.monotonic()
    SystemSampler(interval_s=60).close()
    assert time.monotonic() - begin < 50


def test_names_in_the_journal() -> None:
    values = [float(i) for i in range(len(SYSTEM_METRICS))]
    values[-1] = math.nan
    metrics = node_metrics(3, values)
    assert metrics["system/node-3/cpu_percent"] == 0.0
    assert "system/node-3/gpu_memory_used_gib" not in metrics
    assert len(metrics) == len(SYSTEM_METRICS) - 1
