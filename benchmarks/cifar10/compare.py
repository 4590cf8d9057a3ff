"""The tutorial's script, an expert's loop, peers and disttrain on the tutorial's job, in turn, in one run.

    python benchmarks/cifar10/compare.py --root DIR [--epochs 3] [--rounds 5] [--rounds-of-peers 5]

DIR holds cifar-10-batches-py (an altered copy will do). Each round runs every program once, one after another, so that
a machine whose speed drifts does not favour one. Compared is each one's best epoch, of the same number for all: beside
the first of disttrain's, and on slow cores the second, MLflow starts, once in a run. Prints the seconds per epoch and
the ratios, pair by pair: median, least and most. With one worker the weights of disttrain and of the hand-written loop
must have the same bits. Lightning and Accelerate take part where they are installed (`pip install -e '.[bench]'`).
They and the tutorial's script take three times as long as the others; `--rounds-of-peers` has them in the first rounds
only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = tuple(name for name in ("lightning", "accelerate") if importlib.util.find_spec(name))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def program(name: str, root: Path, epochs: int) -> dict[str, Any]:
    """Run one of the hand-written programs; its answer."""
    kind, _, workers = name.partition(" ")
    start = TORCHRUN if workers == "x2" else [sys.executable]
    script = [str(HERE / "peers.py"), kind] if kind in PEERS else [str(HERE / f"{kind}.py")]
    command = [*start, *script, "--root", str(root), "--epochs", str(epochs)]
    answer: dict[str, Any] = json.loads(printed_by(command).splitlines()[-1])
    return answer


def printed_by(command: list[str]) -> str:
    """Run a program; if it fails, end with what it wrote on stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def ours(workers: int, root: Path, epochs: int) -> dict[str, Any]:
    """Run disttrain; the same answer, from its journal."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "disttrain_launch", "train", "cifar10-net", "-n", str(workers)]
        command += ["--run-dir", str(run), "-o", f"data.root={root}", "-o", "data.verify=false"]
        command += ["-o", f"train.epochs={epochs}"]
        printed_by(command)
        rows = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        metrics = [row["metrics"] for row in rows if row["kind"] == "metrics"]
        digest = printed_by([sys.executable, "-m", "disttrain_launch", "runs", "hash", str(run)])
    return {
        "epoch_seconds": [row["train/epoch_seconds"] for row in metrics if "train/epoch_seconds" in row],
        "accuracy": [row["eval/accuracy"] for row in metrics if "eval/accuracy" in row][-1],
        "sha256": digest.strip(),
    }


def words(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rounds-of-peers", type=int, help="by default all")
    parser.add_argument("--without-tutorial", action="store_true")
    arguments = parser.parse_args()
    if arguments.rounds_of_peers is not None and arguments.rounds_of_peers < 1:
        parser.error("--rounds-of-peers: one at least")
    programs = {
        "handwritten x1": lambda: program("handwritten x1", arguments.root, arguments.epochs),
        "disttrain x1": lambda: ours(1, arguments.root, arguments.epochs),
        "handwritten x2": lambda: program("handwritten x2", arguments.root, arguments.epochs),
        "disttrain x2": lambda: ours(2, arguments.root, arguments.epochs),
    }
    peers: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in [f"{peer} x{size}" for peer in PEERS for size in (1, 2)]:
        peers[name] = partial(program, name, arguments.root, arguments.epochs)
    if not arguments.without_tutorial:
        peers["tutorial"] = lambda: program("tutorial", arguments.root, arguments.epochs)
    seconds: dict[str, list[float]] = {name: [] for name in programs | peers}
    same = []
    for number in range(arguments.rounds):
        with_peers = arguments.rounds_of_peers is None or number < arguments.rounds_of_peers
        answers = {name: run() for name, run in (programs | peers if with_peers else programs).items()}
        for name, answer in answers.items():
            seconds[name].append(min(answer["epoch_seconds"]))
        same.append(answers["handwritten x1"]["sha256"] == answers["disttrain x1"]["sha256"])
        rounds = ", ".join(f"{name} {seconds[name][-1]:.2f}" for name in answers)
        print(f"seconds per epoch: {rounds}", flush=True)
    print(f"seconds per epoch, the best of {arguments.epochs} in each run: median (least to most)")
    for name, values in seconds.items():
        print(f"  {name:<16} {words(values)} of {len(values)}")
    print("ratios, pair by pair")
    pairs = [("disttrain x1", "handwritten x1"), ("disttrain x2", "handwritten x2"), ("disttrain x2", "handwritten x1")]
    pairs += [(f"disttrain x{size}", f"{peer} x{size}") for peer in PEERS for size in (1, 2)]
    pairs += [(name, "tutorial") for name in ("disttrain x1", "disttrain x2") if "tutorial" in peers]
    for first, second in pairs:
        ratios = [a / b for a, b in zip(seconds[first], seconds[second], strict=False)]  # peers: the first rounds
        print(f"  {first} / {second:<16} {words(ratios)}")
    print(f"one worker, same bits as the hand-written loop: {'yes' if all(same) else 'NO'}")
    return 0 if all(same) else 3  # as ../bounds.py has it


if __name__ == "__main__":
    sys.exit(main())
