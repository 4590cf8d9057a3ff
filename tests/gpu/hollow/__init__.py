"""A GPU that computes nothing, for a machine without one, and counts of what it is asked to do.

`device.c` and `kernels.c` answer for CUDA's runtime, cuBLAS and cuDNN in a process that loads them before torch.
All else is PyTorch's build for CUDA as it is: which operands it refuses, what it copies, where the host waits.
All numbers on the device read as zeros, so it shows nothing about results and speed. By its older interface, which
stands in here, cuDNN takes no convolutions of bfloat16: these are other kernels than a GPU's, and more.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[3]
_KINDS = ("kernel", "wait", "to the device", "to the host", "on the device")
_LIBRARY = "libcuda.so.1"  # the driver's name, which a library of torch's asks for
_OF_CUDA = ("CUDA_", "CUBLAS", "CUDNN_", "NCCL_", "PYTORCH_", "TORCH")


def why_not() -> str:
    """What is missing here to have one; empty if nothing is."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the stand-ins for CUDA's libraries are written for Linux on x86-64"
    if shutil.which("gcc") is None:
        return "no gcc"
    if not _parses(b"#include <stdlib.h>\n"):
        return "gcc has no headers of the C library"
    if not (torch.version.cuda or "").startswith("13."):
        return "torch is not built for CUDA 13"
    if _runtime() is None:
        return "torch has CUDA's runtime within its own libraries, where nothing can stand in for it"
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return "processes have a limit of addresses (ulimit -v)"
    return "" if _headers() else "no headers of CUDA 13"


def why_not_in(folder: Path) -> str:
    """Why no process can load a library from this folder before others; empty if one can."""
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return f"{folder} is mounted noexec"
    return f"LD_PRELOAD takes no path with a space or a colon: {folder}" if set(" :") & set(str(folder)) else ""


def _runtime() -> Path | None:
    """The library of CUDA's runtime that this process has loaded with torch."""
    found = re.search(r"/.*/libcudart\.so.*", Path("/proc/self/maps").read_text())
    return Path(found[0]) if found is not None else None


def _headers() -> list[Path]:
    """Folders of CUDA 13's headers: those beside its runtime lack some as wheels, which triton has; all, or none."""
    runtime, triton = _runtime(), find_spec("triton")
    found = [runtime.parents[1] / "include"] if runtime is not None else []
    if triton is not None:
        found.append(Path(str(triton.origin)).parent / "backends/nvidia/include")
    code = b"#include <cuda.h>\n#include <cuda_runtime_api.h>\n#if CUDART_VERSION / 1000 != 13\n#error\n#endif\n"
    return found if _parses(code, found) else []


def _parses(code: bytes, headers: Sequence[Path] = ()) -> bool:
    command = ["gcc", "-fsyntax-only", "-xc", *(f"-I{folder}" for folder in headers), "-"]
    return not subprocess.run(command, input=code, stderr=subprocess.DEVNULL).returncode


def built(folder: Path) -> dict[str, str]:
    """Build the stand-ins in a folder. Returns the variables of a process that is to have the GPU."""
    library, sources = folder / _LIBRARY, sorted(Path(__file__).parent.glob("*.c"))
    headers = [f"-I{one}" for one in _headers()]
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-w", *headers, *sources, f"-Wl,-soname,{_LIBRARY}", "-o", library],
        check=True, timeout=300,
    )  # fmt: skip
    return {
        "LD_PRELOAD": str(library),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "CHECKS_DEVICE": "cuda",
        "CUDA_VISIBLE_DEVICES": "0",
    }


def python(arguments: list[str], variables: Mapping[str, str], timeout_s: float) -> str:
    """What a Python process with these variables prints. Raises CalledProcessError, TimeoutExpired."""
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "launch")])
    # What somebody's own ask of CUDA, as another allocator or a wait after each kernel, is not what is counted.
    others = {name: value for name, value in os.environ.items() if not name.startswith(_OF_CUDA)}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=_ROOT, env={**others, "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed = process.communicate(timeout=timeout_s)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, arguments)
    return printed


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
