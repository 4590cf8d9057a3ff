"""What a lost worker costs, and what it costs to be ready for one.

    python benchmarks/loss.py lose [--losses 20] [--restarts 5]
    python benchmarks/loss.py undisturbed [--pairs 40] [--starts 4] [--recipe digits]

Both train in exact mode with four workers, without MLflow; `lose` trains `digits`. (`--recipe`, `-o KEY=VALUE` and
`--workers` change that.)

`lose` kills single workers by SIGKILL, each at a random moment once the one before has been replaced or the run has
continued, and prints the seconds until the next new step is journalled: with `parallel.on_lost_worker = "continue"`,
and with "restart", where all start again from the newest checkpoint.

`undisturbed` trains `digits`, and a short epoch of `cifar10-net` on images that are made up, with either policy side by
side: one run stands still (SIGSTOP) while the other makes the steps of a second or two, whole epochs with evaluation
and checkpoint, then they change places, A B B A. Two such blocks are a pair, and what drifts slower than seconds, as
the machine's speed does, is the same for both. Measured is the processor time per step of all threads of all workers
and of the launcher. Each start is made anew `--starts` times, since where a process has its memory matters, too.
Printed is the median of the pairs' ratios with an interval that has the true one with a probability of 95 %.
`--policy restart` compares "restart" with itself: what is printed then is what the measurement itself is off by.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL

import psutil
from spread import interval_of_median, quartiles

from disttrain.layout import JOURNAL
from disttrain_launch.local.group import module_arguments
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
PHASE_S = 0.001  # a block ends within so much of a step's end
_PROCESS_CLOCK = 2  # of another process: see clock_getcpuclockid(3)
MOST_S, WORST_S, OF_A_RESTART, MOST_RATIO = 1.0, 3.0, 0.15, 1.01


def arguments(policy: str, steps: int, asked: argparse.Namespace, *limits: str) -> list[str]:
    """Those of `disttrain train`."""
    settled = (*RECIPE, *asked.overrides, f"train.max_steps={steps}", f"parallel.on_lost_worker={policy}")
    return [asked.recipe or "digits", *(word for one in settled for word in ("-o", one)), *limits]


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


@dataclass(frozen=True)
class Undisturbed:
    """What a run without a loss trains: whole epochs of `num_steps`, with an evaluation and a checkpoint each."""

    recipe: str
    overrides: tuple[str, ...]
    num_steps: int

    def command(self, policy: str, run_dir: Path, asked: argparse.Namespace) -> list[str]:
        """What starts it with this policy."""
        settled = (*RECIPE, *self.overrides, *asked.overrides, f"parallel.on_lost_worker={policy}")
        options = [word for one in settled for word in ("-o", one)]
        where = ["-n", str(asked.workers), "--run-dir", str(run_dir)]
        return [sys.executable, *module_arguments("disttrain_launch", "train", self.recipe, *options, *where)]


UNDISTURBED = (
    Undisturbed("digits", (), 5 * 23),
    Undisturbed("cifar10-net", ("data.dataset=synthetic", "data.options={num_train=6000,num_test=400}"), 60),
)


class Side:
    """A run that makes steps in `block` alone: the rest of the time it stands still."""

    def __init__(self, policy: str, folder: Path, asked: argparse.Namespace, trained: Undisturbed) -> None:
        """Starts it, and has it stand still once it has made an epoch."""
        self._num_steps, self._group = trained.num_steps, Group(folder / JOURNAL, asked.workers)
        with folder.with_suffix(".log").open("wb") as log:
            self._launcher = psutil.Popen(trained.command(policy, folder, asked), stdin=DEVNULL, stdout=log, stderr=log)
        self._processes: list[psutil.Process] = [self._launcher]
        self._until(trained.num_steps)
        self._processes += self._launcher.children()
        assert len(self._processes) == asked.workers + 1
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Kill it."""
        self._signal(signal.SIGKILL)
        psutil.wait_procs(self._processes)

    def block(self) -> float:
        """Processor time per step, in seconds, of the next steps."""
        before, first = self._processor_s(), self._group.step
        self._signal(signal.SIGCONT)
        self._until(first + self._num_steps)
        self._signal(signal.SIGSTOP)
        return (self._processor_s() - before) / (self._group.step - first)

    def _until(self, step: int) -> None:
        """Wait until this step is journalled."""
        self._group.read()
        while self._group.step < step:
            assert self._launcher.poll() is None, "the run has ended"
            time.sleep(PHASE_S)
            self._group.read()

    def _processor_s(self) -> float:
        """Of all threads of these processes so far, the ended ones included, in the kernel's nanoseconds."""
        return sum(time.clock_gettime((~process.pid << 3) | _PROCESS_CLOCK) for process in self._processes)

    def _signal(self, number: int) -> None:
        # The launcher first, and last: it would report workers that stand still.
        in_order = self._processes if number == signal.SIGSTOP else self._processes[::-1]
        for process in in_order:
            with suppress(psutil.Error):
                process.send_signal(number)


def measured_pairs(trained: Undisturbed, num_pairs: int, asked: argparse.Namespace) -> list[float]:
    """The ratios of one start of both runs: the policy that is asked for to "restart"."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = []
        for number, one in enumerate((asked.policy, "restart")):
            sides.append(Side(one, Path(folder, str(number)), asked, trained))
            stack.callback(sides[-1].end)
        for pair in range(num_pairs + 1):
            order = (0, 1) if pair % 2 else (1, 0)
            cost = {index: sides[index].block() for index in order}
            if pair:  # the first one warms up
                ratios.append(cost[0] / cost[1])
    return ratios


def compare_undisturbed(asked: argparse.Namespace) -> bool:
    """Pairs without a loss; whether all recipes keep within the bound."""
    is_met = True
    for trained in UNDISTURBED:
        if asked.recipe not in (None, trained.recipe):
            continue
        ratios: list[float] = []
        for start in range(asked.starts):
            left = asked.pairs - len(ratios)
            found = measured_pairs(trained, -(-left // (asked.starts - start)), asked)
            ratios += found
            print(f"{trained.recipe}, start {start + 1}: median ratio {statistics.median(found):.4f}", flush=True)
        low, middle, high = quartiles(ratios)
        interval = interval_of_median(ratios)
        words = "too few for an interval" if interval is None else "95 %: {:.4f} to {:.4f}".format(*interval)
        is_met &= middle <= MOST_RATIO
        print(
            f"{trained.recipe}: median ratio {middle:.4f} of {len(ratios)} pairs ({words}; quartiles {low:.3f} to "
            f"{high:.3f}); at most {MOST_RATIO}: {'met' if middle <= MOST_RATIO else 'NOT MET'}",
            flush=True,
        )
    return is_met


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("lose", "undisturbed"))
    parser.add_argument("--recipe", help="by default digits, and for undisturbed cifar10-net, too")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--policy", default="continue", choices=("continue", "restart"))
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    asked = parser.parse_args()
    started = time.monotonic()
    is_met = (compare_losses if asked.mode == "lose" else compare_undisturbed)(asked)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
