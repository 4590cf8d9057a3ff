"""All comparisons in turn, and the page that holds what they came to: what `make bench` runs.

    python benchmarks/run.py [NAME...] [--root DIR] [--into docs/benchmarks.md] [--quick] [--list]

Without names every comparison runs, which takes about two hours on two quiet cores, and with `--quick`, of fewer rounds
each, about 40 minutes; `--list` shows their names. Those on CIFAR-10 need `--root`, the folder that holds
cifar-10-batches-py. After each, its section of the page is replaced; the others stay as they are, and so does the
section of one that fails, is interrupted or cannot be measured here: the next one runs, and the end names it. A section
says when, on what machine, with which versions, of which commit and under which load it was measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bounds import MISSED

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MEASURED = ("disttrain", "launch", "benchmarks", "pyproject.toml")  # what a change of the source would be in
LIMIT_S = 3600.0  # of one comparison; with --quick a third of it
VERSIONS = ("torch", "torchvision", "mlflow", "lightning", "accelerate")
INTRODUCTION = """# Benchmarks

Written by `make bench` (`make bench ARGS="--root DIR"` with CIFAR-10; `make bench ARGS="step parts"` for some).
What is compared takes turns within one run, so that a machine whose speed drifts does not favour one: look at the
ratios. Each section has its own date and commit. [results.md](results.md) has the bounds that the project sets itself,
what the numbers mean, and what was learned on the way.
"""


@dataclass(frozen=True)
class Comparison:
    """A program under benchmarks/, and what it shows."""

    title: str
    words: tuple[str, ...]
    quick: tuple[str, ...] = ()
    """What makes it short: options that come after the words."""
    needs_cifar10: bool = False


COMPARISONS = {
    "start": Comparison("From the command to the first step", ("start.py",), ("--rounds", "3")),
    "end": Comparison("From the last step to the prompt", ("start.py", "--end"), ("--rounds", "2")),
    "step": Comparison("A step against a loop by hand", ("step.py",), ("--rounds", "40")),
    "parts": Comparison(
        "Microseconds of a step's parts, with one worker and with two",
        ("parts.py", "--workers", "1,2"),
        ("--rounds", "20"),
    ),
    "shared": Comparison(
        "Gradients of two workers in shared memory against gloo", ("shared_memory.py",), ("--rounds", "30")
    ),
    "batches": Comparison("Augmented batches against torchvision's transforms", ("batches.py",)),
    "cifar10": Comparison(
        "The tutorial's job: peers and disttrain",
        ("cifar10/compare.py",),
        ("--rounds", "3", "--rounds-of-peers", "1"),
        needs_cifar10=True,
    ),
    "text": Comparison("Language modeling against a loop by hand", ("text_gpt.py",), ("--rounds", "12")),
    "exact": Comparison("Exact mode against fast mode", ("exact.py", "steps"), ("--rounds", "10")),
    "resume": Comparison("A resumed run against a cold start", ("exact.py", "resume"), ("--rounds", "2")),
    "sharded": Comparison("Sharded training: time of a step", ("fsdp.py", "steps")),
    "large": Comparison(
        "Sharded training of 12.6 million parameters: time of a step",
        ("fsdp.py", "steps", "--dim", "512", "--rounds", "10"),
        ("--rounds", "6"),
    ),
    "memory": Comparison("Sharded training: memory of a worker", ("fsdp.py", "memory"), ("--layers", "4")),
    "checkpoint": Comparison("How long a checkpoint holds the loop", ("checkpoint.py", "stall"), ("--rounds", "10")),
    "observing": Comparison("What observing costs, all together", ("observing.py",)),
    "tracking": Comparison("What MLflow costs", ("tracking.py",), ("--rounds", "2", "--epochs", "4")),
    "loss": Comparison("A lost worker against a restart", ("loss.py",), ("--losses", "6", "--restarts", "2")),
    "ready": Comparison("What it costs to be ready for a loss", ("ready.py",), ("--seconds", "55", "--starts", "1")),
    "bytes": Comparison(
        "Weights that meet every 50 steps over 100 Mbit/s, as root on Linux",
        ("bytes.py", "--recipe", "benchmarks/flat.toml", "--ways", "every 50", "every 50, int8"),
        ("--rounds", "1"),
    ),
    "worlds": Comparison(
        "Larger worlds on slow links, as root on Linux", ("worlds.py",), ("--sites", "2", "8", "--rates", "100mbit")
    ),
    "accuracy": Comparison(
        "What fewer bytes cost in accuracy",
        ("accuracy.py", "-o", "train.epochs=3", "-o", "optim.lr=0.01"),
        ("--seeds", "0", "1", "--ways", "bf16", "every 50", "every 50, int8"),
        needs_cifar10=True,
    ),
    "harness": Comparison("The test harness", ("harness.py",), ("--tests", "5")),
}


def commit() -> str:
    """Which one this is, and whether the source differs from it; nothing where this is no checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE.parent, check=True, capture_output=True, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--", *MEASURED)
        return f", commit {git('rev-parse', '--short', 'HEAD').strip()}{' with changes' if changed else ''}"
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """What it runs on, and how busy that is."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    packages = [f"Python {platform.python_version()}"]
    for package in VERSIONS:
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = f"load before {os.getloadavg()[0]:.1f}"
    day = time.strftime("%Y-%m-%d")
    return f"{day}{commit()}, {os.cpu_count()} cores ({model}), {load}; {', '.join(packages)}."


def printed_by(command: list[str], limit_s: float) -> tuple[str, int | None]:
    """What a program prints, shown as it comes, and its exit code; whatever ends this one ends the program, too.

    The exit code is None if the program was still running after `limit_s`, and so was ended.
    """
    program = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert program.stdout is not None
    is_late = threading.Event()
    limit = threading.Timer(limit_s, end_late, [program, is_late])
    limit.start()
    lines = []
    try:
        for line in program.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = program.wait()
        return "".join(lines), None if is_late.is_set() else code
    finally:
        limit.cancel()
        stop(program)


def end_late(program: subprocess.Popen[str], is_late: threading.Event) -> None:
    """End what runs at its limit; a program that has ended, but whose output has not been read, is in time."""
    if program.poll() is None:
        is_late.set()
    stop(program)


def end_with_this_process() -> None:
    """Have a SIGTERM end the program that runs, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def stop(program: subprocess.Popen[str]) -> None:
    """End a program and what it started: with Ctrl-C, so that it can take down its machines, then less gently."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(program.pid, signum)
            program.wait(timeout=20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def section(name: str, root: Path | None, *, quick: bool = False) -> tuple[str, str]:
    """Run a comparison: its section of the page, empty if there is none; and in a word what was wrong, if anything."""
    one = COMPARISONS[name]
    where = machine()
    options = [*one.words[1:], *(one.quick if quick else ())]
    arguments = ["--root", str(root.resolve())] if one.needs_cifar10 and root else []
    began = time.monotonic()
    command = [sys.executable, str(HERE / one.words[0]), *options, *arguments]
    limit_s = LIMIT_S / 3 if quick else LIMIT_S
    printed, code = printed_by(command, limit_s)
    took = time.monotonic() - began
    if code is None:
        return "", f"failed (not done after {limit_s / 60:.0f} min)"
    if code not in (0, MISSED):
        return "", f"failed (exit code {code})"
    if printed.startswith("not measured"):
        return "", "cannot be measured here"
    words = [f"'{word}'" if " " in word else word for word in options]
    command = ["python", f"benchmarks/{one.words[0]}", *words, *(["--root DIR"] if arguments else [])]
    time_taken = f"{took / 60:.0f} min" if took > 120 else f"{took:.0f} s"
    end = " A bound was missed." if code else ""
    text = f"{one.title}\n\n{where}\n\n`{' '.join(command)}`, {time_taken}.{end}\n\n```\n{printed.rstrip()}\n```\n"
    return text, "missed a bound" if code else ""


def sections_of(page: Path) -> dict[str, str]:
    """The sections that a page has, by title."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return {part.partition("\n")[0]: part.rstrip() + "\n" for part in text.split("\n## ")[1:]}


def measure(options: argparse.Namespace, wrong: dict[str, str]) -> None:
    """Run what was asked for, write the page after each, and note by name what was wrong."""
    for name in options.names or COMPARISONS:
        if COMPARISONS[name].needs_cifar10 and options.root is None:
            wrong[name] = "left out, since --root was not given"
            continue
        print(f"{name}: {COMPARISONS[name].title}", flush=True)
        text, what = section(name, options.root, quick=options.quick)
        if what:
            wrong[name] = what
        if not text:
            continue
        known = sections_of(options.into) | {COMPARISONS[name].title: text}
        titles = [one.title for one in COMPARISONS.values() if one.title in known]
        page = "\n## ".join([INTRODUCTION, *(known[title] for title in titles)])
        whole = options.into.with_name(f".{options.into.name}.new")
        whole.write_text(page, encoding="utf-8")
        whole.replace(options.into)


def main() -> None:
    """Run what was asked for, and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--into", type=Path, default=PAGE)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of each")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    for name, one in COMPARISONS.items() if options.list else ():
        print(f"{name:<12}{one.title}{' (needs --root)' if one.needs_cifar10 else ''}")
    if options.list:
        return
    unknown = [name for name in options.names if name not in COMPARISONS]
    if unknown:
        parser.error(f"no comparison {unknown[0]!r}; there are {', '.join(COMPARISONS)}")
    end_with_this_process()
    wrong: dict[str, str] = {}
    try:
        measure(options, wrong)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {options.into} has the sections that were complete")
    finally:
        for name, what in wrong.items():
            print(f"{name}: {what}", flush=True)
    sys.exit(any(what.startswith("failed") for what in wrong.values()))


if __name__ == "__main__":
    main()
