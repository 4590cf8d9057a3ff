"""What each way to meet sends, and how fast it trains, between two machines on a slow link. Needs root on Linux.

    python benchmarks/bytes.py [--recipe digits] [--rate 100mbit] [--rounds 3] [--ways bf16 "every 50"] [-o KEY=VALUE]…

Two simulated machines with one worker each are joined by a link that lets `--rate` pass in each direction. Each round
trains the recipe to its end in every way, one after another, so that a machine whose speed drifts does not favour one.
Bytes are those that a machine's interface has sent, the mean of both, everything included: start, metrics, agreement,
gradients, and what a checkpoint collects.
Samples per second are those between the first and the last row of losses in the journal: evaluations and checkpoints
included, start and end not.
Printed are medians with the least and the most, as ratios to float32's of the same round, and the accuracy reached.
Without root nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from here import has_machines, here
from ways import WAYS

from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.testing import cluster
from disttrain.testing.hosts import Host

COMMON = (
    "train.threads=1",
    "train.log_every_steps=10",
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "checkpoint.keep_last=1",
)


@dataclass(frozen=True)
class Measured:
    """One run: bytes sent per step, samples per second, and what its evaluation came to."""

    bytes_per_step: float
    samples_per_s: float
    evaluation: dict[str, float]


def bytes_sent(machine: Host) -> int:
    """By this machine's interface, since it was made."""
    counters = json.loads(
        subprocess.run(
            ["ip", "-n", machine.namespace, "-s", "-j", "link", "show", "dev", machine.interface],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    sent: int = counters[0]["stats64"]["tx"]["bytes"]
    return sent


def measure(run_dir: Path, recipe: str, rate: str, overrides: list[str]) -> Measured:
    """Train to the end on two fresh machines."""
    settings = [word for override in overrides for word in ("-o", override)]
    with cluster(2) as machines:
        for machine in machines:
            machine.limit(rate)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += [f"--master-addr={machines[0].address}", "--master-port=29500"]
        runs = [
            machine.start(
                [*command, f"--node-rank={rank}", "-m", "disttrain", recipe, *settings, "--run-dir", str(run_dir)],
                env=os.environ | {"GLOO_SOCKET_IFNAME": machine.interface},
                stdout=subprocess.DEVNULL,
                stderr=(run_dir.parent / f"{run_dir.name}-{rank}.err").open("wb"),
            )
            for rank, machine in enumerate(machines)
        ]
        if any(run.wait(timeout=1200) for run in runs):
            sys.exit("".join(path.read_text()[-3000:] for path in run_dir.parent.glob(f"{run_dir.name}-*.err")))
        sent = sum(map(bytes_sent, machines)) / len(machines)
    rows = [row for row in read_journal(run_dir / "journal.jsonl") if "train/loss" in row.get("metrics", {})]
    (first, *_, last) = rows
    num_samples = (last["step"] - first["step"]) * load_recipe(recipe, overrides).data.batch_size
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    return Measured(sent / last["step"], num_samples / (last["time"] - first["time"]), evaluation["metrics"])


def spread(values: list[float], form: str) -> str:
    """The median with the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Measure in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS][1:], default=[*WAYS][1:], help="besides float32")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if not has_machines():
        return
    print(here())
    print(f"{options.recipe}, two machines of one worker, {options.rate} each way, {options.rounds} rounds", flush=True)
    ways = {name: override for name, override in WAYS.items() if name in ("float32", *options.ways)}
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, override in ways.items():
                overrides, place = (
                    [*COMMON, *options.overrides, *override.split()],
                    f"{name.replace(' ', '-')}-{number}",
                )
                found[name].append(measure(Path(folder, place), options.recipe, options.rate, overrides))
    base = found["float32"]
    for name, runs in found.items():
        sent = spread([run.bytes_per_step for run in runs], ",.0f")
        less = spread([one.bytes_per_step / run.bytes_per_step for run, one in zip(runs, base, strict=True)], ".2f")
        speed = spread([run.samples_per_s for run in runs], ",.0f")
        faster = spread([run.samples_per_s / one.samples_per_s for run, one in zip(runs, base, strict=True)], ".2f")
        print(f"{name}: {sent} bytes per step, {less} times fewer; {speed} samples/s, {faster} times as fast")
        print(f"    {', '.join(f'{key} {value:.4f}' for key, value in runs[-1].evaluation.items())}")


if __name__ == "__main__":
    main()
