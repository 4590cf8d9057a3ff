"""What it costs to observe a run: its journal, MLflow, progress, guards and watchdog, all together.

    python benchmarks/observing.py [--workers 1] [--epochs 8] [--first 4]

Trains `cifar10-net` on made-up images as users start it, with MLflow in a database, and counts processor time: of the
calls in a step that look at it or report it, of the threads that watch beside it, and of the processes that feed
MLflow. Printed is each one's share of all the processor time of worker 0 and of those processes, from the end of the
first epochs to that of the last: MLflow's start, which every run has once, is over by then and stands in a line of its
own, and the charts, which are drawn after the last step, are part of the end (`start.py --end`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from bounds import end
from here import here

import disttrain
from disttrain.health.nonfinite import NonFiniteGuard
from disttrain.health.progress import Progress
from disttrain.tracking import Tracker
from disttrain.training.monitor import RunMonitor

MOST = 0.01
FIRST, FOUND = "OBSERVING_FIRST", "observing.json"
CALLS = {
    "guards": [(NonFiniteGuard, "begin_step"), (NonFiniteGuard, "check")],
    "progress, metrics, journal": [
        (RunMonitor, "after_step"),
        *((Tracker, name) for name in ("metrics", "event", "artifact")),
        *((Progress, name) for name in ("at", "tick")),
    ],
}
THREADS = ("disttrain-beats", "disttrain-judge", "disttrain-system", "disttrain-stop-file", "launcher-watch")


class Observed(disttrain.Hook):
    """Counts, in worker 0, from the end of some first epochs to that of the last."""

    def __init__(self) -> None:
        self.first, self.is_inside = int(os.environ[FIRST]), False
        self.seconds: dict[str, float] = defaultdict(float)
        self.before: dict[str, float] = {}
        for name, calls in CALLS.items():
            for owner, method in calls:
                self.count(owner, method, name)

    def count(self, owner: type, method: str, name: str) -> None:
        """Have the calls of a method counted, but for those within another that is."""
        original = getattr(owner, method)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self.is_inside or threading.current_thread() is not threading.main_thread():
                return original(*arguments, **options)
            self.is_inside, began = True, time.thread_time()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds[name] += time.thread_time() - began
                self.is_inside = False

        setattr(owner, method, counted)

    def after_evaluation(self, context: disttrain.HookContext) -> None:
        """Begin or end."""
        if context.rank == 0 and context.epoch == self.first:
            self.before = self.counted()
        if context.rank == 0 and context.step == context.total_steps:
            now = self.counted()
            found = {"once": self.before, "then": {name: now[name] - self.before.get(name, 0.0) for name in now}}
            (context.run_dir / FOUND).write_text(json.dumps(found))

    def counted(self) -> dict[str, float]:
        """Processor seconds until now."""
        beside = [thread for thread in threading.enumerate() if thread.name in THREADS]
        children = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
        return {
            "all of worker 0": time.process_time(),
            **self.seconds,
            "watchdog, sampler of the machine, stop requests": sum(map(of_thread, beside)),
            "processes that feed MLflow": sum(times.user + times.system for times in children),
        }


def of_thread(thread: threading.Thread) -> float:
    """Its processor seconds."""
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--first", type=int, default=4, help="epochs before it counts")
    options = parser.parse_args()
    if not 0 < options.first < options.epochs:
        parser.error("--first: at least one epoch before it counts, and one while it does")
    print(here())
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["train.hooks=['observing:Observed']", f"train.epochs={options.epochs}", "data.dataset=synthetic"]
        overrides += ["data.options={num_train=50000, num_test=10000}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        command = [sys.executable, "-P", "-m", "disttrain_launch", "train", "cifar10-net", "--run-dir", f"{folder}/run"]
        command += ["-n", str(options.workers), *(word for override in overrides for word in ("-o", override))]
        modules = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, FIRST: str(options.first), "PYTHONPATH": modules}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            sys.exit(ended.stdout + ended.stderr)
        found = json.loads(Path(folder, "run", FOUND).read_text())
    once, then = found["once"]["processes that feed MLflow"], found["then"]
    own = then.pop("all of worker 0")
    whole = own + then["processes that feed MLflow"]
    for name, seconds in then.items():
        print(f"{name:<50}{seconds / whole:>8.2%}")
    share = sum(then.values()) / whole
    print(f"{'all together':<50}{share:>8.2%}, at most {MOST:.0%}, of {whole:.1f} s of processor time")
    print(f"MLflow's start, once: {once:.1f} s of processor time")
    end(share <= MOST)


if __name__ == "__main__":
    main()
