"""The proof that a recipe gives the same bits: one undisturbed run, disturbed ones, and where they diverge."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disttrain.layout import CHECKPOINTS, NEEDS_A_RESTART, RECIPE, checkpoint_name
from disttrain.recipe import ConfigurationError, DisttrainError, ExitCode
from disttrain_launch.local.group import module_arguments
from disttrain_launch.prove.disturbed import DisturbedRun, RunFailed, Start, Story, disturb
from disttrain_launch.prove.losses import Pace
from disttrain_launch.prove.report import counted


class Proof:
    """Runs in `folder`, with the `arguments` of `disttrain train`; `say` gets the progress."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        workers: Sequence[int],
        kills: int,
        say: Callable[[str], None],
        strategies: Sequence[str] = (),
        *,
        losses: int = 0,
        with_steps: Callable[[int], Sequence[str]] | None = None,
    ) -> None:
        """The starts of a disturbed run take `strategies` in turn (empty: the recipe's).

        `losses`: how many workers each disturbed run loses beside its kills. `with_steps` gives the arguments for
        another number of steps, if the runs may be longer so that there is time for all losses.
        """
        self._folder, self._arguments, self._strategies = folder, arguments, strategies
        self._workers, self._kills, self._say, self._losses = workers, kills, say, losses
        self._with_steps = with_steps
        self._reference = folder / "undisturbed"
        self._different: list[tuple[Path, dict[str, Any], Story]] = []

    def carry_out(self) -> dict[str, Any]:
        """All runs and how they compare: `same`, `reference`, `runs`, `first_difference` (None if all are the same).

        Raises DisttrainError, with the exit code of a run that ended badly by itself.
        """
        try:
            reference, pace = self._undisturbed()
            steps = pace.steps_for(self._losses, min(self._workers))
            if self._losses and self._with_steps is not None and steps > reference["steps"]:
                self._say(f"  too short for {counted(self._losses, 'loss', 'losses')}: {counted(steps, 'step')}")
                self._arguments = self._with_steps(steps)
                reference, pace = self._undisturbed()
            runs = [self._disturbed(first, reference["steps"], pace) for first in self._workers]
            first_difference = self._first_difference()
        except RunFailed as failure:
            raise _failure(failure) from None
        return {
            "same": all(run["same"] for run in runs),
            "reference": reference,
            "runs": runs,
            **({"losses_wanted": self._losses} if self._losses else {}),  # of each; the steps may end before
            "first_difference": first_difference,
        }

    def _undisturbed(self) -> tuple[dict[str, Any], Pace]:
        workers = self._workers[0]
        shutil.rmtree(self._reference, ignore_errors=True)
        self._say(f"undisturbed, with {counted(workers, 'worker')} ...")
        started = time.time()
        with DisturbedRun(self._reference, self._arguments) as run:
            run.run(workers)
            times = [moment for moment, _ in run.steps()]
            why = run.words_after(NEEDS_A_RESTART)
            if self._losses and why is not None:
                raise ConfigurationError(f"--lose: this recipe cannot continue without a lost worker: {why}")
        if self._losses and len(times) < 2:
            raise ConfigurationError(
                f"--lose: a run of {counted(len(times), 'step')} shows no pace, and has no time for a loss; "
                "give it two or more: -o train.epochs=N"
            )
        report = self._compared(self._reference)
        self._say(f"  {time.time() - started:.1f} s, {counted(report['step'], 'step')}")
        pace = Pace(times[0] - started, (times[-1] - times[0]) / max(1, len(times) - 1))
        hashes = {name: report[name] for name in ("weights_sha256", "optimizer_sha256")}
        return {"workers": workers, "kills": 0, "steps": report["step"], "steps_repeated": 0, **hashes}, pace

    def _disturbed(self, first: int, num_steps: int, pace: Pace) -> dict[str, Any]:
        losses = [counted(self._losses, "loss", "losses")] * (self._losses > 0)
        kills = [counted(self._kills, "kill")] * (self._kills > 0 or not losses)
        self._say(f"{', '.join([*kills, *losses])}, starting with {counted(first, 'worker')} ...")
        started = time.time()
        # A loss that restarts the run shows in the table; so many in so little time would do it by themselves.
        limits = ["--max-losses", str(self._losses), "--max-restarts", str(self._losses)] if self._losses else []
        run_dir = self._folder / f"workers-{first}"
        with DisturbedRun(run_dir, [*self._arguments, *limits], self._strategies) as run:
            disturb(run, first, self._workers, self._kills, self._losses, num_steps, pace)
        report, story = self._compared(run.run_dir), run.story
        self._say(f"  {time.time() - started:.1f} s, {'the same' if report['same'] else 'NOT THE SAME'}")
        losses_made = _of_losses(run) if self._losses else {}
        if report["same"]:
            run.remove()
        else:
            self._different.append((run.run_dir, report, story))
        return {
            "workers": first,
            "resumed_with": [start.workers for start in story.starts[1:]],
            **({"strategies": [start.strategy for start in story.starts]} if self._strategies else {}),
            "kills": story.kills,
            "steps_repeated": story.steps_repeated,
            **losses_made,
            "weights_sha256": report["weights_sha256"],
            "optimizer_sha256": report["optimizer_sha256"],
            "same": report["same"],
        }

    def _compared(self, run_dir: Path, reference: Path | None = None) -> dict[str, Any]:
        folders = (str(reference or self._reference), str(run_dir))
        command = [sys.executable, *module_arguments("disttrain.commands.compare", *folders)]
        answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if answer.returncode != 0:
            raise RunFailed(answer.returncode, answer.stderr.strip())
        report: dict[str, Any] = json.loads(answer.stdout)
        return report

    def _first_difference(self) -> dict[str, Any] | None:
        """Where a run first diverges from the reference: the very step, if retraining from a checkpoint shows it.

        `step` and `tensor` are the first that differ, `same_until` the last step known to be the same.
        """
        if not self._different:
            return None
        run_dir, report, story = min(self._different, key=lambda entry: _step_of_difference(entry[1]))
        coarse = report["first_tensor"]
        if coarse is None:
            metric = report["first_metric"]
            name = metric["name"] if metric else None
            return {"step": _step_of_difference(report), "tensor": None, "metric": name, "same_until": None}
        found = {"step": coarse["step"], "tensor": coarse["name"], "same_until": coarse["same_until"]}
        if coarse["step"] - coarse["same_until"] > 1:
            self._say(f"  looking for the first step after {coarse['same_until']} that differs ...")
            start = [start for start in story.starts if start.step <= coarse["same_until"]][-1]
            fine = self._replayed(run_dir, start, coarse["same_until"], coarse["step"])
            if fine is not None:
                found = {"step": fine["step"], "tensor": fine["name"], "same_until": fine["same_until"]}
        return {**found, "metric": None}

    def _replayed(self, run_dir: Path, start: Start, begin: int, end: int) -> dict[str, Any] | None:
        """The first tensor that differs when both train from step `begin` to `end` again, saving at every step."""
        copies = []
        undisturbed = Start(self._workers[0], 0)
        for source, how in ((self._reference, undisturbed), (run_dir, start)):
            copy = source.with_name(f"{source.name}-again")
            shutil.rmtree(copy, ignore_errors=True)
            (copy / CHECKPOINTS).mkdir(parents=True)
            shutil.copy(source / RECIPE, copy)
            if begin:
                name = checkpoint_name(begin)
                shutil.copytree(source / CHECKPOINTS / name, copy / CHECKPOINTS / name)
            strategies = [] if how.strategy is None else [how.strategy]
            with DisturbedRun(copy, [*self._arguments, "-o", "checkpoint.every_steps=1"], strategies) as run:
                run.run_until(how.workers, copy / CHECKPOINTS / checkpoint_name(end))
            copies.append(copy)
        found: dict[str, Any] | None = self._compared(copies[1], copies[0])["first_tensor"]
        if found is not None:
            found["same_until"] = max(begin, found["same_until"])
        return found


def _of_losses(run: DisturbedRun) -> dict[str, Any]:
    """What became of the losses of a run."""
    story = run.story
    seconds = [loss.seconds for loss in story.losses]
    ranks = Counter(loss.rank for loss in story.losses)
    return {
        "losses": len(seconds),
        "lost_ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "seconds_per_loss": {"median": round(statistics.median(seconds), 3), "worst": max(seconds)}
        if seconds
        else None,
        "slices_recomputed": run.num_slices_recomputed(),
        "restarts": story.restarts,
    }


def _step_of_difference(report: dict[str, Any]) -> int:
    found: dict[str, Any] = report["first_tensor"] or report["first_metric"] or report
    return int(found["step"])


def _failure(failure: RunFailed) -> DisttrainError:
    error = DisttrainError(str(failure).removeprefix("disttrain: "))
    known = {code.value for code in ExitCode}
    error.exit_code = ExitCode(failure.exit_code if failure.exit_code in known else 1)  # type: ignore[misc]
    return error
