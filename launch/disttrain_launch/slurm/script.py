"""The batch script of a job, rendered from a value."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass

from disttrain.errors import ExitCode
from disttrain.layout import DEVICE

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ports that systems hand out by themselves

_FORBIDDEN_AGAIN = (
    "# Slurm was allowed to requeue this job for its time limit, and would do so after a node's failure from then on.",
    '[ -z "$SLURM_RESTART_COUNT" ] || scontrol update JobId="$SLURM_JOB_ID" Requeue=0',
    "",
)


@dataclass(frozen=True)
class SlurmJob:
    """A training job on some nodes, or with a `sweep` an array of such jobs.

    Args:
        name: of the job.
        recipe: a shipped recipe's name, or a path that every node can read; None resumes the run in `run_dir`.
        overrides: as in `-o KEY=VALUE`.
        run_dir: where the run lives, or with a sweep the runs.
        nodes: how many.
        workers: per node, as in `-n`.
        directives: further `#SBATCH` lines, in their order: ("time", "4:00:00").
        warn_s: how long before the time limit the job is asked to save.
        grace_s: how long saving may take; less than `warn_s`.
        max_restarts: as in `--max-restarts`.
        sweep: keys and the values that each is to take; a job for each combination.
        prologue: shell lines that every job begins with, such as those that activate an environment.
        trust: as `--trust`.
        continues: whether the other nodes continue without one that is lost.
        stops: whether a loss is to end the job, that of a node too.
    """

    name: str
    recipe: str | None
    overrides: tuple[str, ...]
    run_dir: str
    nodes: int
    workers: str
    directives: tuple[tuple[str, str], ...]
    warn_s: int
    grace_s: int
    max_restarts: int
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = ()
    prologue: str = ""
    trust: bool = False
    continues: bool = False
    stops: bool = False

    @property
    def points(self) -> list[tuple[str, ...]]:
        """The overrides of each job of the sweep; none without one."""
        return points_of(self.sweep)

    @property
    def _asks_for_gpus(self) -> bool:
        return any(name == "gpus-per-node" for name, _ in self.directives)

    def text(self) -> str:
        """The script that `sbatch` takes."""
        return "\n".join([*self._head(), "", *self._choice(), *self._body()]) + "\n"

    def _head(self) -> list[str]:
        points = self.points
        log = "%x-%A_%a.log" if points else "%x-%j.log"
        directives = [
            ("job-name", self.name),
            ("nodes", str(self.nodes)),
            ("ntasks-per-node", "1"),
            *([("array", f"0-{len(points) - 1}")] if points else []),
            # Requeueing after a node's failure is what no job may do that a loss is to end.
            ("no-requeue" if self.stops else "requeue", ""),
            *([("no-kill", "")] if self.continues else []),
            ("open-mode", "append"),
            ("output", log),
            ("signal", f"B:USR1@{self.warn_s}"),
            *self.directives,
        ]
        lines = [
            f"#SBATCH --{name}={_directive(value)}" if value else f"#SBATCH --{name}" for name, value in directives
        ]
        return ["#!/bin/bash", "# One task on each node runs `disttrain node`; see docs/slurm.md.", *lines]

    def _choice(self) -> list[str]:
        """The shell lines that set the run directory, and the overrides of this job of a sweep."""
        if not self.sweep:
            return [f"run_dir={shlex.quote(self.run_dir)}", "overrides=()", ""]
        lines = ['case "$SLURM_ARRAY_TASK_ID" in']
        for number, point in enumerate(self.points):
            place = f"{self.run_dir}/{'+'.join(re.sub(r'[^A-Za-z0-9_.=-]+', '-', part) for part in point)}"
            words = " ".join(f"-o {shlex.quote(part)}" for part in point)
            lines.append(f"    {number}) run_dir={shlex.quote(place)}; overrides=({words}) ;;")
        lines += ['    *) echo "no such job in this sweep: $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac", ""]
        return lines

    def _body(self) -> list[str]:
        words = [
            *([shlex.quote(self.recipe)] if self.recipe is not None else []),
            *(f"-o {shlex.quote(override)}" for override in self.overrides),
            *["--trust"] * self.trust,
        ]
        return [
            *([self.prologue.rstrip("\n"), ""] if self.prologue.strip() else []),
            'host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"port=$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))",
            *([f"export {DEVICE}=${{{DEVICE}:-cuda}}"] if self._asks_for_gpus else []),
            "node=(",
            f"    disttrain node {' '.join(words)}".rstrip(),
            '    "${overrides[@]}" --run-dir "$run_dir"',
            f'    --nodes {self.nodes} --rendezvous "$host:$port" --job-id "$SLURM_JOB_ID"',
            f"    -n {shlex.quote(self.workers)} --max-restarts {self.max_restarts} --stop-grace {self.grace_s}",
            ")",
            "",
            *(_FORBIDDEN_AGAIN if self.stops else []),
            "# Slurm warns this script alone; srun hands the signal on to `disttrain node`: all workers save and stop.",
            "warned= again=",
            "trap 'warned=yes again=yes; kill -USR1 \"$step\" 2>/dev/null' USR1",
            "# Each task needs its own number, so the shell that expands it is the task's.",
            f"srun --kill-on-bad-exit=0{' --no-kill' if self.continues else ''} bash"
            ' -c \'exec "$@" --node-rank "$SLURM_NODEID"\' bash "${node[@]}" &',
            "step=$!",
            "# A signal ends `wait` before the step has ended.",
            'while wait "$step"; code=$?; [ "$code" -gt 128 ] && [ -n "$again" ]; do again=; done',
            "",
            f"# {ExitCode.STOPPED}: stopped, and saved. Requeued only if it was the time limit: a job that is "
            "cancelled stays away.",
            f'if [ "$code" -eq {ExitCode.STOPPED} ] && [ -n "$warned" ]; then',
            *(['    scontrol update JobId="$SLURM_JOB_ID" Requeue=1'] if self.stops else []),
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
        ]


def points_of(sweep: tuple[tuple[str, tuple[str, ...]], ...]) -> list[tuple[str, ...]]:
    """The overrides of each job of a sweep: a job for each combination of the values; none without a sweep."""
    if not sweep:
        return []
    return list(itertools.product(*([f"{key}={value}" for value in values] for key, values in sweep)))


def _directive(value: str) -> str:
    """As `sbatch` reads it: quoted where it holds more than a word."""
    return (
        value if re.fullmatch(r"[^\s\"'\\#]+", value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )
