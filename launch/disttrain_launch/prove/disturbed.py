"""A training run that is killed on purpose, again and again, and restarted each time."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from disttrain.layout import JOURNAL, newest_checkpoint, step_of
from disttrain.runs.journal import read_journal
from disttrain_launch.local.group import module_arguments
from disttrain_launch.prove.losses import Group, Loss, Losses, Pace

_POLL_S = 0.01
_TO_END_S = 60.0
# Of the kills, this share comes while workers start: everything before the first new step.
_AT_START_UP = 0.25


class RunFailed(Exception):
    """The run ended by itself, and not well: its exit code and its last words."""

    def __init__(self, exit_code: int, words: str) -> None:
        super().__init__(words)
        self.exit_code = exit_code


@dataclass
class Start:
    """One start of the run: with how many workers, from which step, by which strategy (None: the recipe's)."""

    workers: int
    step: int
    strategy: str | None = None


@dataclass
class Story:
    """What a run went through: its starts, how often it was killed, and how many steps had to be repeated."""

    starts: list[Start] = field(default_factory=list)
    kills: int = 0
    steps_repeated: int = 0
    losses: list[Loss] = field(default_factory=list)
    restarts: int = 0  # by the launcher itself, after a loss that the others did not continue without


class DisturbedRun:
    """`disttrain train` in a folder of its own. Whatever happens in the `with` block, no process outlives it."""

    def __init__(self, run_dir: Path, arguments: Sequence[str], strategies: Sequence[str] = ()) -> None:
        """`arguments`: those of the command. Each start takes the next strategy."""
        self.run_dir, self.story, self._strategies = run_dir, Story(), strategies
        self._arguments = arguments
        self._launcher: subprocess.Popen[bytes] | None = None
        self._log = run_dir.with_suffix(".log")
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill(self._processes())

    def run(self, workers: int, meanwhile: Callable[[Group], None] = lambda group: None) -> None:
        """Start the run and let it come to its end. Raises RunFailed."""
        meanwhile(self._start(workers))
        while not self._has_ended():
            time.sleep(_POLL_S)

    def run_until(self, workers: int, checkpoint: Path) -> None:
        """Start the run and end it once the checkpoint is there. Raises RunFailed."""
        self._start(workers)
        while not checkpoint.exists():
            if self._has_ended():
                return
            time.sleep(_POLL_S)
        self._kill(self._processes())

    def run_until_killed(
        self,
        workers: int,
        target: str,
        step: int,
        after_s: float,
        delay_s: float,
        meanwhile: Callable[[Group], None] = lambda group: None,
    ) -> bool:
        """Start the run and kill `target`: "worker" (one of them, at random), "launcher" or "all".

        That happens `delay_s` after the journal holds `step`, or `after_s` after the start if that is earlier. False if
        the run came to its end before. Raises RunFailed.
        """
        group = self._start(workers)
        latest = time.monotonic() + after_s
        meanwhile(group)
        if not self._wait(lambda: time.monotonic() >= latest or self.newest_step() >= step):
            return False
        due = min(latest, time.monotonic() + delay_s)
        if not self._wait(lambda: time.monotonic() >= due):
            return False
        launcher, *others = self._processes()
        own = [process for process in others if _parent(process) == launcher.pid]
        victims = {"worker": [random.choice(own)] if own else [], "launcher": [launcher]}
        for victim in victims.get(target) or [launcher, *others]:
            _kill(victim)
        self.story.kills += 1
        self._wait_until_gone([launcher, *others])
        return True

    def steps(self) -> list[tuple[float, int]]:
        """When each step was first journalled, in seconds since 1970."""
        if not (self.run_dir / JOURNAL).exists():
            return []
        rows = (row for row in read_journal(self.run_dir / JOURNAL) if "train/loss" in row.get("metrics", {}))
        return [(row["time"], row["step"]) for row in rows]

    def newest_step(self) -> int:
        """The newest step in the journal; repeated steps do not show."""
        rows = self.steps()
        return rows[-1][1] if rows else 0

    def remove(self) -> None:
        """Remove everything it wrote."""
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def workers(self) -> dict[int, psutil.Process]:
        """The worker processes, by the rank that each was started as."""
        found: dict[int, psutil.Process] = {}
        launcher, *others = self._processes() or [None]
        for process in sorted(others, key=psutil.Process.create_time):  # a replacement after whom it replaces
            with suppress(psutil.Error, ValueError):  # it has ended, or is just being started
                if launcher is not None and process.ppid() == launcher.pid:
                    found[int(process.environ().get("RANK", ""))] = process
        self._seen.update(found.values())
        return found

    def pause(self, seconds: float) -> bool:
        """Wait for a moment; False if the run has ended. Raises RunFailed."""
        time.sleep(seconds)
        return not self._has_ended()

    def num_slices_recomputed(self) -> int:
        """How many slices were computed again since workers were lost."""
        events = (row for row in read_journal(self.run_dir / JOURNAL) if row.get("name") == "worker-lost")
        return sum(event["slices_recomputed"] for event in events)

    def words_after(self, beginning: str) -> str | None:
        """The rest of the first line that begins so, of what it has printed."""
        if not self._log.exists():
            return None
        lines = self._log.read_text(errors="replace").splitlines()
        return next((line.removeprefix(beginning) for line in lines if line.startswith(beginning)), None)

    def _start(self, workers: int) -> Group:
        newest = newest_checkpoint(self.run_dir)
        step = step_of(newest) if newest else 0
        turn = len(self.story.starts)
        strategy = self._strategies[turn % len(self._strategies)] if self._strategies else None
        self.story.starts.append(Start(workers, step, strategy))
        self.story.steps_repeated += max(0, self.newest_step() - step)
        chosen = [] if strategy is None else ["-o", f"parallel.strategy={strategy}"]
        command = [sys.executable, *module_arguments("disttrain_launch", "train", *self._arguments, *chosen)]
        group = Group(self.run_dir / JOURNAL, workers)
        with self._log.open("ab") as log:
            self._launcher = subprocess.Popen(
                [*command, "-n", str(workers), "--run-dir", str(self.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return group

    def _processes(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        if self._launcher is None:
            return []
        try:
            launcher = psutil.Process(self._launcher.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _has_ended(self) -> bool:
        assert self._launcher is not None
        code = self._launcher.poll()
        if code is None:
            return False
        self._conclude(code)
        return True

    def _conclude(self, code: int) -> None:
        left = [process for process in self._seen if _runs(process)]
        if left:
            raise RunFailed(1, f"{left[0]} outlived the run that it belonged to")
        if code != 0:
            words = self._log.read_text(errors="replace").strip().splitlines()
            raise RunFailed(code if code > 0 else 1, "\n".join(words[-5:]))

    def _wait(self, until: Callable[[], bool]) -> bool:
        while not until():
            if self._has_ended():
                return False
            time.sleep(_POLL_S)
        return not self._has_ended()

    def _kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            _kill(process)
        self._wait_until_gone(processes)

    def _wait_until_gone(self, processes: list[psutil.Process]) -> None:
        if self._launcher is None:
            return
        _, alive = psutil.wait_procs(processes[1:], timeout=_TO_END_S)
        for process in alive:
            _kill(process)
        try:
            self._launcher.wait(timeout=_TO_END_S)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait()
        self._launcher = None


def disturb(
    run: DisturbedRun, first: int, sizes: Sequence[int], kills: int, losses: int, num_steps: int, pace: Pace
) -> None:
    """Run to the end, with SIGKILLs at random moments on the way, resuming with other numbers of workers.

    Args:
        run: not started yet.
        first: how many workers it starts with.
        sizes: what it may resume with.
        kills: how many of them end the run; fewer if it ends before.
        losses: how many hit one worker whose loss the others survive; fewer if the run ends before.
        num_steps: how many the whole run has.
        pace: that of an undisturbed run.

    Raises RunFailed.
    """
    workers, dealt = first, Losses(run.workers, run.pause, num_steps, pace)
    run.story.losses = dealt.made

    def lose(group: Group, until: int, due: int) -> None:
        try:
            dealt.deal(group, due - len(dealt.made), until)
        finally:
            run.story.restarts += group.restarts

    # Sorted, since the journal shows a step only once: so the kills are spread over the whole run.
    for moment in sorted(random.uniform(0, 0.9 * num_steps) for _ in range(kills)):
        target = random.choice(["launcher", "all"] if losses else ["worker", "launcher", "all"])
        at_start_up = random.random() < _AT_START_UP
        step = max(math.ceil(moment), run.newest_step() + 1)
        after_s = random.uniform(0, pace.start_up_s) if at_start_up else math.inf
        due = 0 if at_start_up else round(losses * moment / (0.9 * num_steps))

        def meanwhile(group: Group, until: int = step, due: int = due) -> None:
            lose(group, until, due)

        if not run.run_until_killed(workers, target, step, after_s, random.uniform(0, 2 * pace.step_s), meanwhile):
            return
        workers = random.choice([size for size in sizes if size != workers] or [workers])
    run.run(workers, lambda group: lose(group, num_steps, losses))


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended. Orphans in a container may stay zombies: its first process need not look for them."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return 0


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
