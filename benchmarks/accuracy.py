"""What each way to send fewer bytes costs in accuracy, at equal samples: a recipe trained to its end in each, in turn.

    python benchmarks/accuracy.py [--recipe cifar10-net] [--ways "every 50" bf16 ...] [--seeds 0 1 2] [--workers 2]
                                  [--root DIR] [--into FILE] [-o KEY=VALUE]...

Every seed is trained in every way, one after another, by the same warm workers on this machine: what is learned does
not depend on how fast the link between them is. Printed is each way's last evaluation, in the task's main metric: the
mean over the seeds with the least and the most, and how much better or worse it was than float32's of the same seed.
With `--into`, each run is a line of that file; what it has already is not trained again.
A run that diverges is a result; where one fails in another way, the exit code is 1 after all others are done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from ways import OTHER_STEPS, WAYS

import disttrain
from disttrain.errors import DivergedError
from disttrain.testing import WorkerFailed, workers

BASE = "float32"
ALL_WAYS = WAYS | OTHER_STEPS
COMMON = (
    "train.threads=1",
    "train.log_every_steps=50",
    "train.eval_every_epochs=1000",
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "checkpoint.keep_last=1",
)


def train(recipe: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
    """One run, in whatever world this process is; its last evaluation."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return disttrain.train(recipe, overrides=overrides, run_dir=run_dir).metrics


def spread(values: list[float], form: str = ".4f") -> str:
    """The mean with the least and the most."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(runs: list[dict[str, Any]], metric: str) -> list[str]:
    """A line for each way; a difference is to the base's run of the same seed."""
    base = {run["seed"]: run["metrics"][metric] for run in runs if run["way"] == BASE}
    lines = []
    for way in dict.fromkeys(run["way"] for run in runs):
        of_way = {run["seed"]: run["metrics"][metric] for run in runs if run["way"] == way}
        apart = [value - base[seed] for seed, value in of_way.items() if seed in base]
        difference = f", against {BASE} {spread(apart, '+.4f')}" if apart and way != BASE else ""
        seeds = f"{len(of_way)} seed{'s' * (len(of_way) > 1)}"
        lines.append(f"{way}: {metric} {spread(list(of_way.values()))} of {seeds}{difference}")
    return lines


def main() -> None:
    """Train in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-net")
    parser.add_argument("--ways", nargs="+", choices=[*ALL_WAYS][1:], default=[*ALL_WAYS][1:], help=f"besides {BASE}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--metric", help="by default accuracy, or loss where there is none")
    parser.add_argument("--root", help="of the data; CIFAR-10's: the folder that holds cifar-10-batches-py")
    parser.add_argument("--into", type=Path)
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{options.recipe} {' '.join(options.overrides)}, {options.workers} workers", flush=True)
    runs: list[dict[str, Any]] = []
    failed = []
    if options.into is not None and options.into.exists():
        runs = [json.loads(line) for line in options.into.read_text().splitlines()]
    root = [f"data.root={options.root}", "data.verify=false"] if options.root else []
    asked = {"recipe": options.recipe, "workers": options.workers, "overrides": options.overrides}
    runs = [run for run in runs if run.items() >= asked.items()]
    with (
        tempfile.TemporaryDirectory() as folder,
        workers(options.workers, timeout_s=7200, process_group=False) as group,
    ):
        for seed in options.seeds:
            for way in (BASE, *options.ways):
                if any((run["seed"], run["way"]) == (seed, way) for run in runs):
                    continue
                overrides = [*COMMON, *root, *options.overrides, f"train.seed={seed}", *ALL_WAYS[way].split()]
                try:
                    metrics = group.run(train, options.recipe, overrides, Path(folder, f"{seed} {way}"))[0]
                except WorkerFailed as error:
                    what = "diverged" if isinstance(error.cause, DivergedError) else "failed"
                    print(f"{way}, seed {seed}: {what}: {error}", flush=True)
                    failed += [f"{way}, seed {seed}"] * (what == "failed")
                    continue
                runs.append({**asked, "seed": seed, "way": way, "metrics": metrics})
                print(
                    f"{way}, seed {seed}: {', '.join(f'{key} {one:.4f}' for key, one in metrics.items())}", flush=True
                )
                if options.into is not None:
                    with options.into.open("a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
    if runs:
        metric = options.metric or ("accuracy" if "accuracy" in runs[0]["metrics"] else "loss")
        print("\n".join(table(runs, metric)))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
