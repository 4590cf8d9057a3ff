"""The whole story with real training: pods on hosts of their own run the rendered `disttrain node`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.recipe import load_recipe, to_toml
from disttrain.runs.journal import read_journal
from disttrain.testing import hosts
from tests.launch.kubernetes.conftest import Desk
from tests.launch.kubernetes.fake_cluster import fake_cluster

pytestmark = [
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
    pytest.mark.timeout(900),
]
RECIPE = [
    "-o", "tracking.uri=none", "-o", "train.epochs=3", "-o", "parallel.exact=true", "-o", "checkpoint.every_steps=8",
]  # fmt: skip


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A user of a cluster whose pods train."""
    monkeypatch.chdir(tmp_path)
    with hosts.cluster(1) as machines, fake_cluster(tmp_path, hosts=machines) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield Desk(cluster)


def submitted(desk: Desk, *arguments: str) -> threading.Thread:
    """Submit digits to two nodes, in exact mode, and follow it."""
    desk.submit(*RECIPE, *arguments)
    return desk.follow()


def weights(run_dir: Path) -> tuple[int, str, str]:
    """The step of the newest checkpoint, and the SHA-256 of its weights and of its optimizer's state."""
    manifest = json.loads((max(run_dir.glob("checkpoints/step-????????")) / "manifest.json").read_text())
    files = manifest["files"]
    return manifest["step"], files["model.safetensors"]["sha256"], files["optimizer.safetensors"]["sha256"]


def checkpoints(desk: Desk) -> int:
    """How many checkpoints there are."""
    return len(list(desk.run_dir.glob("checkpoints/step-????????")))


def end(thread: threading.Thread) -> None:
    """Wait for the follower."""
    thread.join(400)
    assert not thread.is_alive()


def reference(desk: Desk, *more: str) -> tuple[int, str, str]:
    """The weights of the same recipe, trained by one worker that nobody disturbs."""
    alone = desk.cluster.folder / "alone"
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", *RECIPE, *more, "--run-dir", str(alone)]
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    return weights(alone)


def test_what_is_rendered_trains_and_its_end_is_seen(real: Desk) -> None:
    real.submit(*RECIPE, "-o", "train.max_steps=3", nodes="1")
    end(real.follow())
    assert real.exit_code == 0, real.lines
    assert real.said[-1] == "complete"
    assert any("accuracy" in line for line in real.lines)
    assert weights(real.run_dir)[0] == 3


@pytest.mark.long
def test_two_nodes_train_one_is_killed_and_the_bits_are_the_same(real: Desk) -> None:
    follower = submitted(real)
    real.cluster.wait("a checkpoint", lambda: checkpoints(real) >= 1, 300)
    real.cluster.kubelet.kill(real.pod(1))
    end(follower)
    assert real.exit_code == 0, real.lines
    assert real.cluster.failures() == 1
    assert len(real.cluster.pods()) == 3
    assert any("accuracy" in line for line in real.lines)
    assert any("2 workers" in line for line in real.lines)
    assert weights(real.run_dir) == reference(real)


@pytest.mark.long
def test_a_node_is_killed_the_other_continues_and_the_new_pod_joins(real: Desk) -> None:
    longer = ("-o", "train.epochs=60", "-o", "checkpoint.every_steps=200")
    follower = submitted(real, *longer)
    real.cluster.wait("a checkpoint", lambda: checkpoints(real) >= 1, 300)
    real.cluster.kubelet.kill(real.pod(1))
    end(follower)
    assert real.exit_code == 0, real.lines
    assert real.cluster.failures() == 1
    names = [record.get("name") for record in read_journal(real.run_dir / "journal.jsonl")]
    assert (names.count("worker-lost"), names.count("worker-joined")) == (1, 1)
    assert not any("Restart" in line for line in real.lines)
    assert weights(real.run_dir) == reference(real, *longer)


@pytest.mark.long
def test_a_stopped_job_has_saved_and_goes_on_with_the_same_bits(real: Desk) -> None:
    follower = submitted(real)
    real.cluster.wait("a checkpoint", lambda: checkpoints(real) >= 1, 300)
    stopped = real.run("stop", "digits")
    assert stopped.exit_code == 0, stopped.output
    assert "safe: the checkpoint is saved." in stopped.stdout
    end(follower)
    assert real.exit_code == 75
    end(submitted(real))
    assert real.exit_code == 0, real.lines
    assert real.cluster.failures() == 0
    assert weights(real.run_dir) == reference(real)


@pytest.mark.long
def test_the_first_node_is_disrupted_and_the_bits_are_the_same(real: Desk) -> None:
    follower = submitted(real)
    real.cluster.wait("a checkpoint", lambda: checkpoints(real) >= 1, 300)
    real.cluster.kubelet.kill(real.pod(0), disruption=True)
    end(follower)
    assert real.exit_code == 0, real.lines
    assert weights(real.run_dir) == reference(real)


@pytest.mark.long
def test_a_recipe_that_cannot_work_is_not_tried_again(real: Desk) -> None:
    follower = submitted(real, "-o", "data.dataset=folder")
    end(follower)
    assert real.exit_code == 78, real.lines
    assert 1 <= len(real.cluster.pods()) <= 2


@pytest.mark.long
def test_nodes_that_come_to_a_finished_run_complete_its_job(real: Desk) -> None:
    """Whichever comes, early or late: node 0, by whose name they would meet, may be gone."""
    real.run_dir.mkdir(parents=True)
    (real.run_dir / "recipe.toml").write_text(to_toml(load_recipe("digits", RECIPE[1::2])))
    (real.run_dir / "journal.jsonl").write_text('{"kind": "status", "status": "FINISHED"}\n')
    real.submit(*RECIPE, nodes="2:4")
    end(real.follow())
    assert real.exit_code == 0, real.lines
    assert real.cluster.failures() == 0
    assert len(real.cluster.pods()) == 4
    assert any(line.endswith("is already finished: there is nothing left to do") for line in real.lines)
