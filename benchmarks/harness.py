"""Trivial tests with two gloo workers: disttrain.testing, torch.multiprocessing.spawn, accelerate, torchtnt, in turn.

    python benchmarks/harness.py [--tests 50] [--world-size 2]

Each test sets up a gloo group, calls one all-reduce and takes the group down. Every round runs one test of each kind,
one after another, so that a machine whose speed drifts does not favour one. accelerate and torchtnt are measured where
they are installed (`pip install accelerate torchtnt 'setuptools<81'`). Prints seconds per test, and how many times
quicker ours is: median, least and most over the rounds. The first round warms up and is shown apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from disttrain.testing import run_workers


def trivial() -> float:
    """The test's body: what every kind below runs in every worker."""
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == dist.get_world_size()
    return tensor.item()


def ours(world_size: int) -> None:
    """disttrain.testing.run_workers: warm workers, a fresh group."""
    assert run_workers(trivial, world_size) == [float(world_size)] * world_size


def _spawned(rank: int, world_size: int, port: int) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    trivial()
    dist.destroy_process_group()


def spawn(world_size: int) -> None:
    """torch.multiprocessing.spawn, as PyTorch's own tests and tutorials do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_spawned, (world_size, port), nprocs=world_size)


def accelerate(world_size: int) -> None:
    """accelerate.test_utils: a script under torchrun, run to its end by execute_subprocess_async."""
    from accelerate.test_utils import execute_subprocess_async

    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "from harness import trivial\n"
        "trivial()\n"
        "dist.destroy_process_group()\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(program)
        script.flush()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        execute_subprocess_async([*torchrun, script.name], echo=False, quiet=True)


def torchtnt(world_size: int) -> None:
    """torchtnt.utils.distributed.spawn_multi_process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchtnt.utils.distributed import spawn_multi_process

    assert spawn_multi_process(world_size, "gloo", trivial) == [float(world_size)] * world_size


def in_pytest(world_size: int, num_tests: int) -> list[float]:
    """Seconds of each test marked `distributed` in one pytest run, setup and teardown included, from its own report."""
    body = (
        "import pytest\nfrom harness import trivial\n"
        f"@pytest.mark.distributed(world_size={world_size})\n"
        f"@pytest.mark.parametrize('number', range({num_tests}))\n"
        "def test_trivial(number):\n    trivial()\n"
    )
    hook = (
        "import json, collections\nTIMES = collections.defaultdict(float)\n"
        "def pytest_runtest_logreport(report):\n    TIMES[report.nodeid] += report.duration\n"
        "def pytest_sessionfinish():\n    open('times.json', 'w').write(json.dumps(list(TIMES.values())))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_trivial.py").write_text(body)
        Path(folder, "conftest.py").write_text(hook)
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_trivial.py"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        times: list[float] = json.loads(Path(folder, "times.json").read_text())
        return times


def cold_start(rounds: int = 3) -> tuple[float, float]:
    """Seconds of `import torch` alone, and of a first two-worker run, each in a fresh interpreter: medians."""
    programs = ("import torch", "from disttrain.testing import run_workers; run_workers(int, 2)")
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for taken, program in zip(seconds, programs, strict=True):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=50)
    parser.add_argument("--world-size", type=int, default=2)
    options = parser.parse_args()
    kinds: dict[str, Callable[[int], None]] = {"disttrain.testing": ours, "torch.multiprocessing.spawn": spawn}
    kinds |= {
        name: function
        for name, module, function in (
            ("accelerate.test_utils", "accelerate", accelerate),
            ("torchtnt spawn_multi_process", "torchtnt", torchtnt),
        )
        if importlib.util.find_spec(module)
    }
    importing, cold = cold_start()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.tests + 1):
        for name, run in kinds.items():
            start = time.perf_counter()
            run(options.world_size)
            seconds[name].append(time.perf_counter() - start)
    marked = in_pytest(options.world_size, options.tests + 1)[1:]

    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(f"{options.tests} trivial tests of {options.world_size} workers each, seconds per test")
    print(f"{'':32}{'first':>8}{'median':>8}{'least':>8}{'most':>8}   times as long as ours")
    own = seconds["disttrain.testing"][1:]
    for name, (first, *rest) in seconds.items():
        ratios = [other / mine for other, mine in zip(rest, own, strict=True)]
        row = f"{name:32}{first:8.3f}{statistics.median(rest):8.3f}{min(rest):8.3f}{max(rest):8.3f}"
        print(row + f"   {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    print(
        f"{'with the marker, in pytest':32}{'':8}{statistics.median(marked):8.3f}{min(marked):8.3f}{max(marked):8.3f}"
    )
    print(f"cold start {cold:.2f} s, import torch {importing:.2f} s: {cold / importing:.2f} times")


if __name__ == "__main__":
    main()
