"""`python -m tests.gpu [NAME…]`: every check in a process of its own, those that measure alone and last.

`python -m tests.gpu.two_gpus` is the same for those that need several GPUs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu import checks, fast, runs, several, speed  # noqa: F401  # registers them
from tests.gpu.registry import CHECKS, DEVICE, SkippedError

_SKIPPED = 5
_AT_ONCE = 4
_PATIENCE = 1 if DEVICE == "cuda" else 10  # the limits are for a GPU


def run_one(name: str, out: Path) -> dict[str, Any]:
    """Run a check in a process; its state, seconds and answer. Its output goes to NAME.log."""
    began, log = time.monotonic(), out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu", "--inside", name],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(CHECKS[name].limit_s * _PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = -1
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    answer = next((json.loads(line[7:]) for line in reversed(lines) if line.startswith("ANSWER ")), None)
    state = {0: "passed", _SKIPPED: "skipped", -1: "timed out"}.get(code, "failed")
    said = answer if answer is not None else " ".join(lines[-1:])
    return {"name": name, "state": state, "seconds": round(time.monotonic() - began, 1), "said": said}


def main(*, on_several: bool = False) -> int:
    """Run the checks, of one GPU, or `on_several`; the exit code is how many have failed."""
    parser = argparse.ArgumentParser(description=f"{__doc__} In DIR: a log each, and checks.json.")
    default = [name for name, one in CHECKS.items() if one.several == on_several]
    parser.add_argument("names", nargs="*", default=default, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-checks")), metavar="DIR")
    parser.add_argument("--until", type=float, default=400.0, help="seconds after which nothing more is started")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--inside", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
    began = time.monotonic()
    together = [name for name in options.names if not CHECKS[name].alone]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        results = list(pool.map(lambda name: run_one(name, options.out), together))
    for name in [name for name in options.names if CHECKS[name].alone]:
        late = time.monotonic() - began > options.until
        results.append(
            {"name": name, "state": "no time", "seconds": 0, "said": ""} if late else run_one(name, options.out)
        )
    (options.out / "checks.json").write_text(json.dumps(results, indent=1))
    for each in results:
        print(f"{each['state']:<10}{each['seconds']:>7.1f} s  {each['name']}  {json.dumps(each['said'])[:300]}")
    bad = sum(each["state"] in ("failed", "timed out") for each in results)
    print(f"{len(results)} checks, {bad} failed, {time.monotonic() - began:.0f} s")
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
