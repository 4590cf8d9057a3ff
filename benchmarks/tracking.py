"""What MLflow costs training: with a server that answers, with one that is dead, and with none.

    python benchmarks/tracking.py [--rounds 5] [--epochs 8]

Starts a real MLflow server on the loopback interface. Each round trains the same job three times, in turn, so that a
machine whose speed drifts does not favour one. Compared are the seconds per epoch but for the first, beside which
MLflow is imported once, and the processor time of the training process, which is quieter. Printed are medians and the
median of the rounds' ratios to the run without MLflow, with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from here import here
from spread import quartiles

# The training process says how much processor time it took, of itself alone.
_WORKER = """
import sys, time
import disttrain
recipe = disttrain.load_recipe("digits", sys.argv[2:])
began = time.process_time()
disttrain.train(recipe, run_dir=sys.argv[1])
print(time.process_time() - began)
"""


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of a server that is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def measure(run_dir: Path, uri: str, epochs: int) -> tuple[float, float]:
    """(seconds per epoch after the first, processor seconds) of one run."""
    overrides = [f"tracking.uri={uri}", f"train.epochs={epochs}", "train.threads=1", "train.log_every_steps=5"]
    overrides += ["data.dataset=synthetic", "data.options={num_train=6400, num_test=100}", "data.crop_padding=0"]
    overrides += ["tracking.log_model=false", f"train.eval_every_epochs={epochs}"]
    command = [sys.executable, "-c", _WORKER, str(run_dir), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    seconds = [row["metrics"]["train/epoch_seconds"] for row in rows if "train/epoch_seconds" in row.get("metrics", {})]
    return statistics.mean(seconds[1:]), float(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse the command line, say where this runs, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    print(here())
    with tempfile.TemporaryDirectory() as name, mlflow_server(Path(name)) as alive:
        uris = {"none": "none", "alive": alive, "dead": "http://127.0.0.1:9"}
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in uris}
        for number in range(options.rounds):
            for kind, uri in uris.items():
                found[kind].append(measure(Path(name, f"{kind}-{number}"), uri, options.epochs))
    for index, what in enumerate(("seconds per epoch", "processor seconds")):
        print(what)
        for kind, measured in found.items():
            values = [one[index] for one in measured]
            ratios = [one[index] / base[index] for one, base in zip(measured, found["none"], strict=True)]
            low, ratio, high = quartiles(ratios)
            print(f"  {kind:<6}{statistics.median(values):>9.3f}   {ratio:.3f} ({low:.3f} to {high:.3f})")
        ratios = [dead[index] / live[index] for dead, live in zip(found["dead"], found["alive"], strict=True)]
        print(f"  dead over alive      {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
