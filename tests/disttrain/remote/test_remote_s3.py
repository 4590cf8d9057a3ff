"""A run in S3, as far as a stand-in of it on this machine goes: the real client, real HTTP, real multipart uploads.

Needs `s3fs` and `moto[server]`, which `make setup` does not install.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from disttrain.remote import RemoteRun
from disttrain.testing import faults, run_workers, workers
from tests.disttrain.parallel.exact_runs import outcome, train
from tests.disttrain.remote.test_remote import expire
from tests.disttrain.remote.test_remote_runs import DEATHS, OFTEN, train_at, train_step_by_step

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            time.sleep(0.1)
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def test_a_run_in_s3_goes_on_from_machine_to_machine_with_the_same_bits(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/runs/one"
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    run_workers(train, 1, args=(tmp_path / "undisturbed", OFTEN), process_group=False)
    for number, (point, count) in enumerate(DEATHS):
        fault = faults.kill(0, at=f"mirror: {point}", count=count)
        with workers(1, faults=[fault], process_group=False, check_collectives=False) as group:
            (ended,) = group.attempt(train_step_by_step, url, tmp_path / f"machine-{number}", aws)
        assert fault.happened, ended.text
        expire(url)
    run_workers(train_at, 2, args=(url, tmp_path / "last", aws), process_group=False)
    there = RemoteRun(url)
    for name in there.objects(""):  # as a user would: the layout is that of a run directory
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(there.read(name) or b"")
    assert outcome(tmp_path / "copy") == outcome(tmp_path / "undisturbed")
    verified = subprocess.run(
        [sys.executable, "-m", "disttrain_launch", "runs", "verify", url, "--json"], capture_output=True, timeout=480
    )
    assert verified.returncode == 0, verified.stderr
    assert all(entry["good"] for entry in json.loads(verified.stdout)["checkpoints"])
