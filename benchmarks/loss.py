"""What a lost worker costs: to continue without it, and to restart. (What it costs to be ready for one: `ready.py`.)

    python benchmarks/loss.py [--losses 20] [--restarts 5] [--recipe digits] [--workers 4] [-o KEY=VALUE]

Trains in exact mode, without MLflow. Single workers are killed by SIGKILL, each at a random moment once the one before
has been replaced or the run has continued. Printed are the seconds until the next new step is journalled: with
`parallel.on_lost_worker = "continue"`, and with "restart", where all start again from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bounds import end

from disttrain_launch.prove.disturbed import DisturbedRun
from disttrain_launch.prove.losses import Group, Loss, Losses, Pace

RECIPE = (
    "parallel.exact=true",
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "tracking.log_model=false",
    "train.log_every_steps=1",
    "train.epochs=1000000",
    "checkpoint.every_steps=50",
)
START_UP_S = 10.0  # about
MOST_S, WORST_S, OF_A_RESTART = 1.0, 3.0, 0.15


def arguments(policy: str, steps: int, asked: argparse.Namespace, *limits: str) -> list[str]:
    """Those of `disttrain train`."""
    settled = (*RECIPE, *asked.overrides, f"train.max_steps={steps}", f"parallel.on_lost_worker={policy}")
    return [asked.recipe, *(word for one in settled for word in ("-o", one)), *limits]


def lose(policy: str, number: int, asked: argparse.Namespace) -> list[Loss]:
    """So many losses of a run with this policy."""
    steps, limits = 10_000_000, ("--max-losses", str(number), "--max-restarts", str(number))
    with tempfile.TemporaryDirectory() as folder:
        with DisturbedRun(Path(folder, "run"), arguments(policy, steps, asked, *limits)) as run:
            # It has more steps than it will ever make, so there is time for each replacement.
            losses = Losses(run.workers, run.pause, steps, Pace(START_UP_S, 1.0))

            def meanwhile(group: Group) -> None:
                losses.deal(group, number, steps)
                assert policy == "restart" or not group.restarts, "a loss has restarted the run"
                raise KeyboardInterrupt  # ends the run, with the block

            with suppress(KeyboardInterrupt):
                run.run(asked.workers, meanwhile)
        for loss in losses.made:
            print(f"{policy:9} rank {loss.rank}  {loss.seconds:.2f} s", flush=True)
        return losses.made


def compare_losses(asked: argparse.Namespace) -> bool:
    """The losses of both policies; whether they keep within the bounds."""
    medians, worst = {}, {}
    for policy, number in (("continue", asked.losses), ("restart", asked.restarts)):
        seconds = [loss.seconds for loss in lose(policy, number, asked)]
        medians[policy], worst[policy] = statistics.median(seconds), max(seconds)
        print(f"{policy}: median {medians[policy]:.2f} s, worst {worst[policy]:.2f} s of {len(seconds)}", flush=True)
    ratio = medians["continue"] / medians["restart"]
    print(f"ratio {ratio:.3f} (at most {OF_A_RESTART}; median {MOST_S} s, worst {WORST_S} s)")
    return medians["continue"] <= MOST_S and worst["continue"] <= WORST_S and ratio <= OF_A_RESTART


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    asked = parser.parse_args()
    started = time.monotonic()
    is_met = compare_losses(asked)
    print(f"{time.monotonic() - started:.0f} s")
    end(is_met)


if __name__ == "__main__":
    main()
