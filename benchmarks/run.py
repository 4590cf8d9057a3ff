"""All comparisons in turn, and the page that holds what they came to: what `make bench` runs.

    python benchmarks/run.py [NAME...] [--root DIR] [--into docs/benchmarks.md] [--quick] [--list]

Without names every comparison runs, which takes two hours on two quiet cores, and with `--quick`, of fewer rounds each,
about 20 minutes; `--list` shows their names. Those on
CIFAR-10 need `--root`, the folder that holds cifar-10-batches-py. After each, its section of the page is replaced; the
others stay as they are. A section says when, on what machine, with which versions and under which load it was measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
VERSIONS = ("torch", "torchvision", "mlflow", "lightning", "accelerate")
INTRODUCTION = """# Benchmarks

Written by `make bench` (`make bench ARGS="--root DIR"` with CIFAR-10; `make bench ARGS="step parts"` for some).
What is compared takes turns within one run, so that a machine whose speed drifts does not favour one: look at the
ratios. [results.md](results.md) has older measurements, with what was learned from them.
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
    "step": Comparison("A step against a loop by hand", ("step.py", "ratio"), ("--rounds", "40")),
    "parts": Comparison(
        "Microseconds of a step's parts, with one worker and with two",
        ("step.py", "parts", "--workers", "1,2"),
        ("--rounds", "20"),
    ),
    "shared": Comparison(
        "Gradients of two workers in shared memory against gloo", ("shared_memory.py",), ("--rounds", "30")
    ),
    "batches": Comparison("Augmented batches against torchvision's transforms", ("batches.py",)),
    "cifar10": Comparison(
        "The tutorial's job: peers and disttrain", ("cifar10/compare.py",), ("--rounds", "2"), needs_cifar10=True
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
    "worlds": Comparison(
        "Larger worlds on slow links, as root on Linux", ("worlds.py",), ("--sites", "2", "8", "--rates", "100mbit")
    ),
    "accuracy": Comparison(
        "What fewer bytes cost in accuracy",
        ("accuracy.py", "-o", "train.epochs=3", "-o", "optim.lr=0.01"),
        ("--seeds", "0", "--ways", "every 50"),
        needs_cifar10=True,
    ),
    "harness": Comparison("The test harness", ("harness.py",), ("--tests", "5")),
}


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
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({model}), {load}; {', '.join(packages)}."


def section(name: str, root: Path | None, *, quick: bool = False) -> str:
    """Run a comparison; its section of the page."""
    one = COMPARISONS[name]
    where = machine()
    options = [*one.words[1:], *(one.quick if quick else ())]
    arguments = ["--root", str(root)] if one.needs_cifar10 else []
    began = time.monotonic()
    program = subprocess.run(
        [sys.executable, str(HERE / one.words[0]), *options, *arguments],
        stdout=subprocess.PIPE,
        stderr=None,
        text=True,
        check=False,
    )
    took = time.monotonic() - began
    command = " ".join(["python", f"benchmarks/{one.words[0]}", *options, *(["--root DIR"] if arguments else [])])
    end = "" if program.returncode == 0 else f" It ended with {program.returncode}: a bound was missed, or it failed."
    return f"{one.title}\n\n{where}\n\n`{command}`, {took / 60:.0f} min.{end}\n\n```\n{program.stdout.rstrip()}\n```\n"


def sections_of(page: Path) -> dict[str, str]:
    """The sections that a page has, by title."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return {part.partition("\n")[0]: part.rstrip() + "\n" for part in text.split("\n## ")[1:]}


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
    for name in options.names or COMPARISONS:
        if COMPARISONS[name].needs_cifar10 and options.root is None:
            print(f"{name}: left out, since --root was not given", flush=True)
            continue
        print(f"{name}: {COMPARISONS[name].title}", flush=True)
        text = section(name, options.root, quick=options.quick)
        print(text, flush=True)
        known = sections_of(options.into) | {COMPARISONS[name].title: text}
        titles = [one.title for one in COMPARISONS.values() if one.title in known]
        page = "\n## ".join([INTRODUCTION, *(known[title] for title in titles)])
        options.into.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
