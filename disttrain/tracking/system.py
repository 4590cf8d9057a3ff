"""How busy each machine is: processor, memory, disk, network and GPUs, sampled on a thread beside the training."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

from disttrain.distributed.gpus import shown_gpus

_GIB = 2.0**30
_MIB = 2.0**20

# The same on every machine, so that the values of several can be combined by position.
SYSTEM_METRICS: tuple[str, ...] = (
    "cpu_percent",  # of all cores
    "memory_percent",
    "memory_used_gib",
    "disk_read_mib_per_s",
    "disk_written_mib_per_s",
    "network_received_mib_per_s",
    "network_sent_mib_per_s",
    "gpu_percent",  # mean over the machine's GPUs
    "gpu_memory_used_gib",  # sum over the machine's GPUs
)


class SystemSampler:
    """Samples this machine every `interval_s` seconds. For one worker of each machine.

    A value that cannot be had (no GPU, no permission) is NaN. Use as a context manager, or call `close`.
    """

    names: Sequence[str] = SYSTEM_METRICS

    def __init__(self, interval_s: float = 5.0) -> None:
        self._interval_s = interval_s
        self._values = [math.nan] * len(SYSTEM_METRICS)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disttrain-system", daemon=True)
        self._thread.start()

    def latest(self) -> list[float]:
        """The newest values, one for each of `names`."""
        return list(self._values)

    def close(self) -> None:
        """Stop sampling."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> SystemSampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            import psutil
        except ImportError:
            return
        gpus = _Gpus()
        before, then = _counters(psutil), time.monotonic()
        psutil.cpu_percent()  # the first call only marks the beginning
        wait_s = min(0.2, self._interval_s)  # a first value soon, for short runs
        while not self._closed.wait(wait_s):
            wait_s = self._interval_s
            after, now = _counters(psutil), time.monotonic()
            rates = [(b - a) / (now - then) / _MIB for a, b in zip(before, after, strict=True)]
            memory = psutil.virtual_memory()
            used = memory.total - memory.available
            self._values = [psutil.cpu_percent(), memory.percent, used / _GIB, *rates, *gpus.sample()]
            before, then = after, now
        gpus.close()


def node_metrics(node: int, values: Sequence[float]) -> Mapping[str, float]:
    """The values of one machine under the names they have in the journal; those that are NaN are left out."""
    return {
        f"system/node-{node}/{name}": value
        for name, value in zip(SYSTEM_METRICS, values, strict=True)
        if not math.isnan(value)
    }


def _counters(psutil: ModuleType) -> list[float]:
    """Bytes read, written, received and sent since the machine was started; NaN where they are not counted."""
    values = [math.nan] * 4
    with contextlib.suppress(Exception):  # containers hide these files, each in its own way
        disk = psutil.disk_io_counters()
        if disk is not None:
            values[:2] = [disk.read_bytes, disk.write_bytes]
    with contextlib.suppress(Exception):
        network = psutil.net_io_counters()
        if network is not None:
            values[2:] = [network.bytes_recv, network.bytes_sent]
    return values


class _Gpus:
    """NVIDIA's GPUs through NVML, if its Python module and a driver are there."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        with contextlib.suppress(Exception):  # no module, no driver, no GPU
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = visible_gpus(pynvml, os.environ)

    def sample(self) -> tuple[float, float]:
        """Mean utilisation in percent and total memory used in GiB."""
        busy, used = [], []
        for handle in self._handles:
            with contextlib.suppress(Exception):
                used.append(float(self._nvml.nvmlDeviceGetMemoryInfo(handle).used))
            with contextlib.suppress(Exception):  # a part of a GPU (MIG) does not have it
                busy.append(float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        return sum(busy) / len(busy) if busy else math.nan, sum(used) / _GIB if used else math.nan

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                self._nvml.nvmlShutdown()


def visible_gpus(nvml: Any, environment: Mapping[str, str]) -> list[Any]:
    """The GPUs that CUDA shows to this process, or the part of one: a machine may have others, for other jobs."""
    installed = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return installed
    first = text.partition(",")[0].strip()
    if first.startswith("MIG-"):  # CUDA shows one part of a GPU, however many are listed
        return [nvml.nvmlDeviceGetHandleByUUID(first)]
    return [installed[index] for index in shown_gpus(text, [_uuid(nvml, handle) for handle in installed])]


def _uuid(nvml: Any, handle: Any) -> str:
    uuid = nvml.nvmlDeviceGetUUID(handle)
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)  # bytes in older versions
