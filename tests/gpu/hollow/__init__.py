"""A GPU that computes nothing, for a machine without one, and counts of what it is asked to do.

`device.c` and `kernels.c` answer for CUDA's runtime, cuBLAS and cuDNN in a process that loads them before torch.
All else is PyTorch's build for CUDA as it is: which operands it refuses, what it copies, where the host waits.
All numbers on the device read as zeros, so it shows nothing about results and speed. By its older interface, which
stands in here, cuDNN takes no convolutions of bfloat16: these are other kernels than a GPU's, and more.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[3]
_KINDS = ("kernel", "wait", "to the device", "to the host", "on the device")
_LIBRARY = "libcuda.so.1"  # the driver's name, which a library of torch's asks for


def why_not() -> str:
    """What is missing here to have one; empty if nothing is."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the stand-ins for CUDA's libraries are written for Linux on x86-64"
    if shutil.which("gcc") is None:
        return "no gcc"
    if not (torch.version.cuda or "").startswith("13."):
        return "torch is not built for CUDA 13"
    return "" if _headers() else "no headers of CUDA, which come with triton"


def _headers() -> Path | None:
    spec = find_spec("triton")
    headers = Path(str(spec.origin)).parent / "backends/nvidia/include" if spec is not None else Path()
    return headers if (headers / "cuda_runtime_api.h").exists() else None


def built(folder: Path) -> dict[str, str]:
    """Build the stand-ins in a folder. Returns the variables of a process that is to have the GPU."""
    library, sources = folder / _LIBRARY, sorted(Path(__file__).parent.glob("*.c"))
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{_headers()}", *sources, f"-Wl,-soname,{_LIBRARY}", "-o", library],
        check=True,
    )
    return {
        "LD_PRELOAD": str(library),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "CHECKS_DEVICE": "cuda",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def python(arguments: list[str], variables: Mapping[str, str], timeout_s: float) -> str:
    """What a Python process with these variables prints. Raises CalledProcessError, TimeoutExpired."""
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "launch")])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=_ROOT, env={**os.environ, "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True,
    )  # fmt: skip
    return done.stdout


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what the device is asked for in the block: kernels, and copies and waits by the place in disttrain."""
    seen: Counter[str] = Counter()

    def note(kind: int, what: bytes) -> None:
        name = _KINDS[kind]
        seen["kernels" if name == "kernel" else f"{name}: {_place()}"] += 1

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)(note)
    hollow = ctypes.CDLL(_LIBRARY)
    hollow.hollow_report_to(callback)
    try:
        yield seen
    finally:
        hollow.hollow_report_to(None)


def _place() -> str:
    """The innermost function of disttrain's that is running."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT / "disttrain"):
            return f"{path.relative_to(_ROOT / 'disttrain')} {frame.f_code.co_qualname}"
    return "elsewhere"
