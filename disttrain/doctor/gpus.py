"""The GPUs that PyTorch sees, and NCCL between them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil

from disttrain.distributed.gpus import count_gpus, installed_gpus
from disttrain.doctor.collective import PATIENCE_S, all_reduced
from disttrain.doctor.finding import Finding, failure, ok, warning
from disttrain.doctor.isolated import CrashedError, Isolated
from disttrain.tracking.system import visible_gpus


def gpus() -> Iterator[Finding]:
    """The GPUs, against those of the driver; where there are some, an all-reduce by NCCL."""
    looking = Isolated(_seen_by_torch)  # CUDA that has been used cannot be used in a fork, and NCCL is tried in forks
    try:
        names, built_for, nccl = looking.result(time.monotonic() + PATIENCE_S)
    finally:
        looking.end()
    installed, visible = installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not names:
        if installed and visible not in (None, "", "-1") and not count_gpus():
            yield failure(
                "gpus",
                f"CUDA_VISIBLE_DEVICES={visible!r} names none of the {installed} that the driver shows",
                "Set it to numbers from 0, or to UUIDs that nvidia-smi -L lists, each once; or unset it.",
            )
        elif installed and visible not in ("", "-1"):
            why = f"is built for CUDA {built_for}" if built_for else "is built for CPUs"
            yield failure(
                "gpus",
                f"the driver shows {installed} and PyTorch sees none; PyTorch {why}",
                "Install the build of torch for the driver's CUDA version (see nvidia-smi), or update the driver.",
            )
        else:
            yield ok("gpus", "none; training uses CPUs")
        return
    found = f"{len(names)} ({', '.join(dict.fromkeys(names))}), CUDA {built_for}"
    if len(names) < installed and "CUDA_VISIBLE_DEVICES" not in os.environ:
        yield warning("gpus", f"{found}; the driver shows {installed}", "Look at nvidia-smi: MIG, or a failed GPU.")
    else:
        yield ok("gpus", found)
    yield from _in_use()
    yield _nccl(len(names), nccl)


def _in_use() -> Iterator[Finding]:
    """The processes that compute on the GPUs, if there are any and NVML shows them: none of the doctor's does yet."""
    try:
        import pynvml
    except ImportError:
        return
    found = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index, gpu in enumerate(visible_gpus(pynvml, os.environ)):
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu):
                memory = process.usedGpuMemory  # None where the driver keeps it to itself
                size = f", {memory / 2**30:.1f} GiB" if memory is not None else ""
                found.append(f"{_name(process.pid)} (process {process.pid}{size}) on GPU {index}")
        pynvml.nvmlShutdown()
    if found:
        yield warning(
            "gpu-processes",
            f"in use: {'; '.join(found)}",
            "They take memory and time of the GPU: end them, or choose other GPUs with CUDA_VISIBLE_DEVICES.",
        )


def _name(process: int) -> str:
    try:
        return str(psutil.Process(process).name())
    except psutil.Error:  # another user's, or outside this container
        return "a program"


def _nccl(size: int, version: str) -> Finding:
    try:
        all_reduced("cuda", size)
    except (CrashedError, ValueError) as error:
        return failure(
            "nccl",
            f"{version}, {size} GPU{'s' if size > 1 else ''} cannot add a tensor: {error}",
            "NCCL_DEBUG=INFO prints "
            "more. In a container: enough shared memory, and no NCCL_* variables of another system.",
        )
    return ok("nccl", f"{version}, {size} GPU{'s' if size > 1 else ''} added 4 MiB")


def _seen_by_torch() -> list[Any]:
    """The names of the GPUs, after each has multiplied a matrix; the CUDA version; NCCL's."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    for index in range(count):
        torch.ones(64, 64, device=f"cuda:{index}").mm(torch.ones(64, 64, device=f"cuda:{index}")).sum().item()
    version: tuple[int, ...] = torch.cuda.nccl.version() if count else ()  # type: ignore[no-untyped-call]
    return [names, torch.version.cuda, f"NCCL {'.'.join(map(str, version))}"]
