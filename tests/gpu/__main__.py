"""`python -m tests.gpu [NAME…]`: every check in a process of its own; those that measure are alone.

`python -m tests.gpu.two_gpus` is the same for those that need several GPUs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.gpu import checks, fast, runs, several, speed  # noqa: F401  # registers them
from tests.gpu.registry import CHECKS, PATIENCE, SkippedError

_SKIPPED = 5
_AT_ONCE = 4
_GRACE_S = 60  # for what is running when time is up
_MOST_PRINTED = 20_000


def run_one(name: str, log: Path, limit_s: float = math.inf) -> dict[str, Any]:
    """Run a check in a process, `limit_s` at most; its state, seconds and answer. What it prints is added to `log`."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu", "--inside", name],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(min(limit_s, CHECKS[name].limit_s * PATIENCE))
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(0)
        printed = file.read()
    with log.open("a") as file_of_all:
        file_of_all.write(f"===== {name}\n{printed[-_MOST_PRINTED:]}\n")
    lines = [line for line in printed.splitlines() if line.strip()]
    answer = next((json.loads(line[7:]) for line in reversed(lines) if line.startswith("ANSWER ")), None)
    state = {0: "passed", _SKIPPED: "skipped", -1: "timed out"}.get(code, "failed")
    said = answer if answer is not None else " ".join(lines[-1:])
    return {"name": name, "state": state, "seconds": round(time.monotonic() - began, 1), "said": said}


def main(*, on_several: bool = False) -> int:
    """Run the checks, of one GPU, or `on_several`; the exit code is how many have failed."""
    parser = argparse.ArgumentParser(description=f"{__doc__} In DIR: checks.json and checks.log.")
    default = [name for name, one in CHECKS.items() if one.several == on_several]
    parser.add_argument("names", nargs="*", default=default, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-checks")), metavar="DIR")
    until = (1800.0 if on_several else 400.0) * PATIENCE
    parser.add_argument("--until", type=float, default=until, help="seconds after which nothing more is started")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--inside", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in CHECKS]:
        parser.error(f"there is no check {unknown[0]!r}: see --list")
    if options.list:
        for name, one in ((name, CHECKS[name]) for name in default):
            print(f"{name:<60}{one.limit_s:>5.0f} s  {(one.function.__doc__ or '').splitlines()[0]}")
        return 0
    if options.inside:
        try:
            answer = CHECKS[options.inside].function()
        except SkippedError as why:
            print(f"skipped: {why}")
            return _SKIPPED
        print(f"ANSWER {json.dumps(answer, default=str)}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    log, began = options.out / "checks.log", time.monotonic()
    log.write_text("")
    results: list[dict[str, Any]] = []
    one_at_a_time = threading.Lock()

    def run(name: str) -> None:
        left = options.until - (time.monotonic() - began)
        if left > 0:
            found = run_one(name, log, left + _GRACE_S)
        else:
            found = {"name": name, "state": "no time", "seconds": 0, "said": ""}
        with one_at_a_time:  # at once: whoever ends all this early has what there was
            results.append(found)
            print(
                f"{found['state']:<10}{found['seconds']:>7.1f} s  {name}  {json.dumps(found['said'])[:300]}", flush=True
            )
            (options.out / "checks.json").write_text(json.dumps(results, indent=1))

    alone = [name for name in options.names if CHECKS[name].alone]
    for name in alone[:1]:  # the first is what matters most: it has a quiet machine while there is time for certain
        run(name)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(run, [name for name in options.names if not CHECKS[name].alone]))
    for name in alone[1:]:
        run(name)
    bad = sum(each["state"] in ("failed", "timed out") for each in results)
    not_run = sum(each["state"] == "no time" for each in results)
    left_out = f", {not_run} without time" if not_run else ""
    print(f"{len(results)} checks, {bad} failed{left_out}, {time.monotonic() - began:.0f} s")
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
