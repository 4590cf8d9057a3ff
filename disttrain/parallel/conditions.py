"""The environment that the bits of a run depend on besides its recipe, and how exact mode keeps it fixed."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from disttrain.parallel.deterministic import deterministic_algorithms
from disttrain.recipe import Recipe

_debugging: Any = torch.utils.deterministic
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_NCCL_NVLS = "NCCL_NVLS_ENABLE"
# What chooses among kernels, or among orders of summation; threads are a fact of their own.
_VARIABLE = re.compile(
    r"(?!.*(_NUM_THREADS|_COMPILE_THREADS|VERBOSE|CACHE_CAPACITY|_CACHE|_DIR|_HOME|LOG\w*|_TIMEOUT\w*)$)"
    r"((ONEDNN|DNNL|MKL|ATEN|TORCHINDUCTOR|TRITON)_\w+|OMP_(DYNAMIC|SCHEDULE|THREAD_LIMIT)|NVIDIA_TF32_OVERRIDE"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)"
)
# Instructions that oneDNN, MKL and ATen have kernels for; the other flags come and go with the kernel and its patches.
_INSTRUCTIONS = re.compile(r"s?sse|avx|fma|f16c|amx|asimd|sve|sme(?!p)|bf16|i8mm|fphp")
_LISTS = (
    "cpu_flags",
    "variables",
    "attention",
    "float32_precision",
)  # facts of many words, of which only those that differ are worth reading


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make new tensors float32 while the block runs, whatever the program around it has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def sums_in_fixed_order(recipe: Recipe) -> Iterator[None]:
    """With `train.deterministic`, have NCCL sum in an order that it fixes. To be entered before the group is joined.

    NVLink's switches (NVLS) sum in the order in which numbers arrive. The user's own setting wins.
    """
    if not recipe.train.deterministic or _NCCL_NVLS in os.environ:
        yield
        return
    os.environ[_NCCL_NVLS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_NCCL_NVLS, None)


@contextmanager
def exact_conditions(recipe: Recipe) -> Iterator[None]:
    """In exact mode: `train.threads` threads (0: one), and deterministic kernels only; all as before afterwards.

    In fast mode cuDNN takes the fastest kernels, or with `train.deterministic` it is as in exact mode but for the
    threads. In both, products on GPUs are as `train.tf32` has them. To be entered before the first kernel runs on a
    GPU: cuBLAS reads its workspace's size once.
    """
    with _products(tf32=recipe.train.tf32):
        if recipe.parallel.exact or recipe.train.deterministic:
            with _deterministic(recipe):
                yield
        else:
            with _cudnn_benchmark(is_on=True):
                yield


@contextmanager
def _products(*, tf32: bool | None) -> Iterator[None]:
    if tf32 is None:
        yield
        return
    backends: Any = torch.backends
    cpu, cudnn = backends.mkldnn.matmul, backends.cudnn
    newer = (backends.cuda.matmul, cpu, cudnn.conv, cudnn.rnn)
    precisions = [one.fp32_precision for one in newer]
    try:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # they were set by the newer names, each for itself
        before = None
    # By the older names: they keep the newer ones in step, and not the other way round (torch 2.11 to 2.14). By that of
    # all products, as torch's compiler asks it, which raises unless CPUs' products are in step with GPUs'.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32 = tf32
    for one in (cudnn.conv, cudnn.rnn):  # which then follow `torch.backends.fp32_precision`
        if one.fp32_precision == "tf32" and not tf32:
            one.fp32_precision = "ieee"
    if precisions[1] in ("none", "ieee"):  # nobody has CPUs' products rounded, and this key is not to
        cpu.fp32_precision = precisions[1]
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before[0])
            cudnn.allow_tf32 = before[1]
        for one, precision in zip(newer, precisions, strict=True):
            one.fp32_precision = precision


@contextmanager
def _cudnn_benchmark(*, is_on: bool) -> Iterator[None]:
    """Whether cuDNN tries its kernels for each shape, and keeps to the one that happens to be fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, is_on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _deterministic(recipe: Recipe) -> Iterator[None]:
    threads, workspace = torch.get_num_threads(), os.environ.get(_CUBLAS_WORKSPACE)
    _read_by_cublas_before()
    filled = _debugging.fill_uninitialized_memory
    # The machine's cores shared out among its workers would be another number at another world size.
    if recipe.parallel.exact:
        torch.set_num_threads(recipe.train.threads or 1)
    _debugging.fill_uninitialized_memory = False  # a debugging aid that writes all memory twice
    os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
    try:
        with deterministic_algorithms(), _cudnn_benchmark(is_on=False):
            yield
    finally:
        torch.set_num_threads(threads)
        _debugging.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(_CUBLAS_WORKSPACE, None)


def environment_fingerprint(device: torch.device) -> dict[str, Any]:
    """The facts about this process that its floating-point results depend on, as JSON can hold them."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "cpu": _processor()[0],
        "cpu_flags": _processor()[1],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "variables": " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if _chooses(name)),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": " ".join(_attention_kernels()),
        "float32_precision": _float32_precision(device.type),
    }
    if device.type == "cuda":
        workspace = [os.environ.get(_CUBLAS_WORKSPACE)]
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "sms": torch.cuda.get_device_properties(device).multi_processor_count,  # kernels are chosen by it
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cublas_workspace": [*_read_by_cublas_before(), *workspace][0] if facts["deterministic"] else workspace[0],
        }
    return facts


@cache
def _read_by_cublas_before() -> tuple[str | None, ...]:
    """The size of its workspace that cuBLAS had read when exact mode was first entered, if it had: it reads it once.

    That it had is known by the GPU's memory: a program that has used some may have multiplied matrices.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    stats = [torch.cuda.memory_stats(gpu) for gpu in range(num_gpus)]
    was_used = any(one.get("allocation.all.allocated", 0) > 0 for one in stats)
    return (os.environ.get(_CUBLAS_WORKSPACE),) if was_used else ()


def _attention_kernels() -> list[str]:
    """Among which kernels torch's attention chooses."""
    kernels: Any = torch.backends.cuda  # these settings are those of CPUs, too
    names = ("flash", "mem_efficient", "cudnn", "math")
    return [name for name in names if getattr(kernels, f"{name}_sdp_enabled")()]


def _float32_precision(device_type: str) -> str:
    """What products of float32 numbers may be rounded to: "matmul=tf32 conv=none" and the like."""
    backends: Any = torch.backends
    matmul, others = (
        (backends.cuda.matmul, backends.cudnn) if device_type == "cuda" else (backends.mkldnn.matmul, backends.mkldnn)
    )
    precisions = {"matmul": matmul, "conv": others.conv, "rnn": others.rnn}
    return " ".join(f"{name}={one.fp32_precision}" for name, one in precisions.items())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The facts that both have and that differ, in words."""
    unlike = [name for name, was in before.items() if name in now and now[name] != was]
    return ["{} was {}, now {}".format(name, *_apart(name, before[name], now[name])) for name in unlike]


def unlike_the_first(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which facts workers differ from rank 0, in words; `facts` by rank."""
    first_unlike = {
        name: next((rank for rank, of in enumerate(facts) if of.get(name) != value), 0)
        for name, value in facts[0].items()
    }
    return [
        "{} is {} on rank 0 and {} on rank {}".format(name, *_apart(name, facts[0][name], facts[rank].get(name)), rank)
        for name, rank in first_unlike.items()
        if rank
    ]


def _apart(name: str, one: Any, other: Any) -> tuple[Any, Any]:
    """How to name two values that differ: of a list of words, only the words that the other does not have."""
    if name not in _LISTS or not (isinstance(one, str) and isinstance(other, str)):
        return one, other
    mine, theirs = one.split(), other.split()
    sides = ([word for word in mine if word not in theirs], [word for word in theirs if word not in mine])
    first, second = (f"with {' '.join(side)}" if side else "without" for side in sides)
    return first, second


def _chooses(variable: str) -> bool:
    return _VARIABLE.fullmatch(variable) is not None


@cache
def _processor() -> tuple[str, str]:
    """The model of the CPU, and its instructions for floating-point numbers."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    found = [facts[key] for key in ("model name", "cpu family", "model", "CPU implementer", "CPU part") if key in facts]
    flags = facts.get("flags") or facts.get("Features") or ""
    instructions = sorted(flag for flag in flags.split() if _INSTRUCTIONS.match(flag))
    return " / ".join(found) or platform.machine(), " ".join(instructions)
