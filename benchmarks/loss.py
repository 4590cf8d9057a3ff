"""What a lost worker costs, and what it costs to be ready for one.

    python benchmarks/loss.py lose [--losses 20] [--restarts 5]
    python benchmarks/loss.py undisturbed [--pairs 10] [--steps 1000]

Both train `digits` in exact mode with four workers, without MLflow. (`--recipe`, `-o KEY=VALUE` and `--workers` change
that.)

`lose` kills single workers by SIGKILL, each at a random moment once the one before has been replaced or the run has
continued, and prints the seconds until the next new step is journalled: with `parallel.on_lost_worker = "continue"`,
and with "restart", where all start again from the newest checkpoint.

`undisturbed` trains with either in turn, first the one, then the other first, and compares the processor time of all
workers per step, of all their threads, from the first tenth of the steps to the last: start and end do not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

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
START_UP_S, POLL_S = 10.0, 0.01  # the first: about
MOST_S, WORST_S, OF_A_RESTART, MOST_RATIO = 1.0, 3.0, 0.15, 1.01


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


def compare_losses(asked: argparse.Namespace) -> None:
    """The losses of both policies."""
    medians = {}
    for policy, number in (("continue", asked.losses), ("restart", asked.restarts)):
        seconds = [loss.seconds for loss in lose(policy, number, asked)]
        medians[policy] = statistics.median(seconds)
        print(f"{policy}: median {medians[policy]:.2f} s, worst {max(seconds):.2f} s of {len(seconds)}", flush=True)
    ratio = medians["continue"] / medians["restart"]
    print(f"ratio {ratio:.3f} (asked: {OF_A_RESTART}; median {MOST_S} s, worst {WORST_S} s)")


def processor_s(workers: Sequence[psutil.Process]) -> float:
    """Of all threads of these workers so far."""
    return sum(sum(worker.cpu_times()[:2]) for worker in workers)


def cost_per_step(policy: str, asked: argparse.Namespace) -> float:
    """Processor time of all workers, in seconds per step."""
    measured: list[float] = []

    def meanwhile(group: Group) -> None:
        first, last = asked.steps // 10, asked.steps - asked.steps // 10
        begun: tuple[int, float] | None = None
        while group.step < last and run.pause(POLL_S):
            group.read()
            if begun is None and group.step >= first:
                workers = list(run.workers().values())
                begun = group.step, processor_s(workers)
        assert begun is not None
        spent, step = processor_s(workers) - begun[1], group.step
        measured.append(spent / (step - begun[0]))

    with (
        tempfile.TemporaryDirectory() as folder,
        DisturbedRun(Path(folder, "run"), arguments(policy, asked.steps, asked)) as run,
    ):
        run.run(asked.workers, meanwhile)
    return measured[0]


def compare_undisturbed(asked: argparse.Namespace) -> None:
    """Pairs of runs without a loss."""
    ratios = []
    for pair in range(asked.pairs):
        order = ("restart", "continue") if pair % 2 else ("continue", "restart")
        cost = {policy: cost_per_step(policy, asked) for policy in order}
        ratios.append(cost["continue"] / cost["restart"])
        words = ", ".join(f"{policy} {1000 * cost[policy]:.2f} ms" for policy in sorted(cost))
        print(f"processor time per step: {words}, ratio {ratios[-1]:.3f}", flush=True)
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    middle = statistics.median(ratios)
    print(f"median ratio {middle:.3f} (quartiles {quarters[0]:.3f}-{quarters[2]:.3f}; asked: {MOST_RATIO})")


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("lose", "undisturbed"))
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    asked = parser.parse_args()
    started = time.monotonic()
    (compare_losses if asked.mode == "lose" else compare_undisturbed)(asked)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
