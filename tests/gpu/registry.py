"""What a check is, and what checks share. CHECKS_DEVICE=cpu tries the checks themselves where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.distributed.ports import reserved_port
from disttrain.recipe import Recipe, load_recipe

DEVICE = os.environ.get("CHECKS_DEVICE", "cuda")
PATIENCE = 1 if DEVICE == "cuda" else 10
"""Limits are for a GPU, which computes beside no other: elsewhere they are so many times as long."""
ROOT = Path(__file__).parents[2]
Answer = dict[str, Any]
Popen = subprocess.Popen[str]

SMALL = (
    "data.dataset=synthetic", "data.options={num_train=256, num_test=64, num_classes=4}", "data.batch_size=64",
    "data.crop_padding=0", "schedule.name=constant", "schedule.warmup_steps=0", "optim.lr=0.0005", "train.epochs=2",
    "model.name=tests.gpu.networks:build", "train.log_every_steps=1", "tracking.uri=none",
    "tracking.system_metrics=false", f"train.device={DEVICE}",
)  # fmt: skip
EXACT = ("parallel.exact=true", "parallel.slices=4")


class SkippedError(Exception):
    """This check needs what is not here."""


@dataclass(frozen=True)
class Check:
    """A function that raises AssertionError, within `limit_s`; one that measures is run `alone`.

    One that needs `several` GPUs is not run on a machine with one.
    """

    function: Callable[[], Answer]
    limit_s: float
    alone: bool
    several: bool


CHECKS: dict[str, Check] = {}


def check(
    limit_s: float, *, alone: bool = False, several: bool = False
) -> Callable[[Callable[[], Answer]], Callable[[], Answer]]:
    """Register a function by its name."""

    def register(function: Callable[[], Answer]) -> Callable[[], Answer]:
        CHECKS[function.__name__] = Check(function, limit_s, alone or several, several)
        return function

    return register


def small(*overrides: str) -> Recipe:
    """A job of eight steps."""
    return load_recipe("digits", [*SMALL, *overrides])


def needs_gpu() -> None:
    """Raises SkippedError without one."""
    if DEVICE != "cuda":
        raise SkippedError("needs a GPU")


def in_a_process(code: str, *, timeout_s: float = 200, variables: Mapping[str, str] | None = None) -> str:
    """The last line that `code` prints, in a process of its own. Raises AssertionError if it fails."""
    done = _started(code, variables or {}).communicate(timeout=timeout_s * PATIENCE)
    return _last_line(done)


def exit_code(code: str, *, timeout_s: float = 200) -> int:
    """How a process that runs `code` ends."""
    process = _started(code, {})
    process.communicate(timeout=timeout_s * PATIENCE)
    return process.returncode


def in_ranks(size: int, code: str, *, timeout_s: float = 250) -> list[str]:
    """The last line of each of `size` ranks that share one device, over gloo: NCCL takes no GPU twice."""
    with reserved_port() as port:
        place = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        share = "from tests.gpu.sharing import share_one_device; share_one_device()"
        ranks = [
            _started(f"{share}\n{code}", {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
        ]
        try:
            return [_last_line(one.communicate(timeout=timeout_s * PATIENCE)) for one in ranks]
        finally:
            for one in ranks:
                one.kill()
                one.wait()


def trained(run_dir: str, *overrides: str) -> str:
    """Code that trains the small job in `run_dir` and prints its step and the SHA-256 of weights and optimizer."""
    return (
        "import disttrain, pathlib\n"
        "from tests.gpu.registry import bits, small\n"
        f"disttrain.train(small(*{overrides!r}), run_dir={run_dir!r})\n"
        f"print(bits(pathlib.Path({run_dir!r})))"
    )


@dataclass(frozen=True)
class Launched:
    """How `disttrain train` ended."""

    code: int
    output: str
    seconds: float


def launcher(size: int, run_dir: Path, *overrides: str, variables: Mapping[str, str] | None = None) -> Popen:
    """`disttrain train` of the small job on `size` workers, just started."""
    options = [word for override in (*SMALL, *overrides) for word in ("-o", override)]
    command = ["-m", "disttrain_launch", "train", "digits", "-n", str(size), "--run-dir", str(run_dir), *options]
    return _python(command, variables or {})


def launched(
    size: int, run_dir: Path, *overrides: str, timeout_s: float = 200, variables: Mapping[str, str] | None = None
) -> Launched:
    """The same to its end. Raises TimeoutExpired."""
    began = time.monotonic()
    process = launcher(size, run_dir, *overrides, variables=variables)
    try:
        output = process.communicate(timeout=timeout_s * PATIENCE)[0]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return Launched(process.returncode, output, round(time.monotonic() - began, 1))


def bits(run_dir: Path) -> str:
    """Step, and the SHA-256 of the weights and of the optimizer, of a run's newest checkpoint."""
    from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256

    newest = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])
    return f"{newest.state['step']} {weights_sha256(newest.model)} {weights_sha256(newest.optimizer)}"


def logged(run_dir: Path, name: str) -> list[float]:
    """A metric's values in a run's journal."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [line["metrics"][name] for line in lines if line["kind"] == "metrics" and name in line["metrics"]]


def _started(code: str, variables: Mapping[str, str]) -> Popen:
    return _python(["-c", code], variables)


def _python(arguments: list[str], variables: Mapping[str, str]) -> Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "launch"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _last_line(done: tuple[str, str]) -> str:
    lines = [line for line in done[0].splitlines() if line.strip()]
    assert lines, "it printed nothing"
    assert "Traceback" not in done[0], done[0][-3000:]
    return lines[-1]
