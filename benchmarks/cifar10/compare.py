"""The tutorial's script, an expert's loop, peers and disttrain on the tutorial's job, in turn, in one run.

    python benchmarks/cifar10/compare.py --root DIR [--epochs 3] [--rounds 5]

DIR holds cifar-10-batches-py (an altered copy will do). Each round runs every program once, one after another, so that
a machine whose speed drifts does not favour one. Compared is each one's best epoch: beside the first of disttrain's,
and on slow cores the second, MLflow starts, once in a run; peers and tutorial make two at most. Prints the seconds per
epoch and the ratios, pair by pair: median, least and most. With one worker the weights of disttrain and of the
hand-written loop must have the same bits. Lightning and Accelerate take part where they are installed (`pip install -e
'.[bench]'`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
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
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ours(workers: int, root: Path, epochs: int) -> dict[str, Any]:
    """Run disttrain; the same answer, from its journal."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "disttrain_launch", "train", "cifar10-net", "-n", str(workers)]
        command += ["--run-dir", str(run), "-o", f"data.root={root}", "-o", "data.verify=false"]
        command += ["-o", f"train.epochs={epochs}"]
        subprocess.run(command, check=True, capture_output=True)
        rows = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        metrics = [row["metrics"] for row in rows if row["kind"] == "metrics"]
        digest = subprocess.run(
            [sys.executable, "-m", "disttrain_launch", "runs", "hash", str(run)],
            check=True,
            capture_output=True,
            text=True,
        )
    return {
        "epoch_seconds": [row["train/epoch_seconds"] for row in metrics if "train/epoch_seconds" in row],
        "accuracy": [row["eval/accuracy"] for row in metrics if "eval/accuracy" in row][-1],
        "sha256": digest.stdout.strip(),
    }


def words(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-tutorial", action="store_true")
    arguments = parser.parse_args()
    programs = {
        "handwritten x1": lambda: program("handwritten x1", arguments.root, arguments.epochs),
        "disttrain x1": lambda: ours(1, arguments.root, arguments.epochs),
        "handwritten x2": lambda: program("handwritten x2", arguments.root, arguments.epochs),
        "disttrain x2": lambda: ours(2, arguments.root, arguments.epochs),
    }
    for name in [f"{peer} x{size}" for peer in PEERS for size in (1, 2)]:
        programs[name] = partial(program, name, arguments.root, min(arguments.epochs, 2))
    if not arguments.without_tutorial:
        programs["tutorial"] = lambda: program("tutorial", arguments.root, min(arguments.epochs, 2))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    same = []
    for _ in range(arguments.rounds):
        answers = {name: run() for name, run in programs.items()}
        for name, answer in answers.items():
            seconds[name].append(min(answer["epoch_seconds"]))
        same.append(answers["handwritten x1"]["sha256"] == answers["disttrain x1"]["sha256"])
        rounds = ", ".join(f"{name} {values[-1]:.2f}" for name, values in seconds.items())
        print(f"seconds per epoch: {rounds}", flush=True)
    print(f"seconds per epoch, the best of each run, {arguments.rounds} rounds: median (least to most)")
    for name, values in seconds.items():
        print(f"  {name:<16} {words(values)}")
    print("ratios, pair by pair")
    pairs = [("disttrain x1", "handwritten x1"), ("disttrain x2", "handwritten x2"), ("disttrain x2", "handwritten x1")]
    pairs += [(f"disttrain x{size}", f"{peer} x{size}") for peer in PEERS for size in (1, 2)]
    pairs += [(name, "tutorial") for name in ("disttrain x1", "disttrain x2") if "tutorial" in programs]
    for first, second in pairs:
        ratios = [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]
        print(f"  {first} / {second:<16} {words(ratios)}")
    print(f"one worker, same bits as the hand-written loop: {'yes' if all(same) else 'NO'}")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
