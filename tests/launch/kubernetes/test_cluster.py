"""Commands against a cluster: the API server, controllers and processes of this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from disttrain_launch.kubernetes.permissions import permissions
from tests.launch.kubernetes.conftest import Desk

pytestmark = pytest.mark.timeout(900)


def end(thread: threading.Thread) -> None:
    """Wait for a follower."""
    thread.join(480)
    assert not thread.is_alive()


def test_a_job_from_submit_to_its_end(desk: Desk) -> None:
    desk.cluster.kubelet.unschedulable = (
        "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes ..."
    )
    out = desk.submit().stdout
    assert "job digits is submitted to namespace default" in out
    follower = desk.follow()
    waiting = "waiting: 0 of 2 nodes, 2 times insufficient nvidia.com/gpu"
    desk.cluster.wait("word of the GPUs", lambda: waiting in desk.said)
    desk.cluster.kubelet.pull_error, desk.cluster.kubelet.unschedulable = "pull access denied\nand more", None
    pulling = "waiting: 0 of 2 nodes, 2 times cannot pull disttrain:test: pull access denied"
    desk.cluster.wait("word of the image", lambda: pulling in desk.said)
    desk.cluster.kubelet.pull_error = None
    desk.wait_for_nodes(2)
    desk.cluster.wait("word of its start", lambda: "running: 2 of 2 nodes" in desk.said)
    status = json.loads(desk.run("status", "digits", "--json").stdout)
    assert (status["state"], status["nodes"], status["running"]) == ("running", 2, 2)
    assert [pod["node"] for pod in status["pods"]] == [0, 1]
    assert "digits  running: 2 of 2 nodes" in desk.run("list").stdout
    desk.tell("done")
    end(follower)
    assert desk.exit_code == 0
    assert desk.said[-1] == "complete"
    assert desk.lines == ["0: node 0 begins", "0: node 0 ends"]  # rank 0's alone
    assert desk.run("logs", "digits", "--no-follow", "--node", "1").stdout == (
        "node 1 | node 1 begins\nnode 1 | node 1 ends\n"
    )
    assert "has already ended" in desk.run("stop", "digits").stdout
    again = desk.run("submit", "digits", "--image", "disttrain:test", "--nodes", "2")
    assert again.exit_code == 78
    assert "such a job has ended; remove it with `disttrain k8s stop digits --now`" in again.stderr


def test_it_is_tried_dry_then_made_by_server_side_apply_and_belongs_to_the_job(desk: Desk) -> None:
    desk.submit()
    patches = [(path, query) for verb, path, query in desk.cluster.store.requests if verb == "PATCH"]
    dry = ["dryRun" in query for _, query in patches]
    assert dry == sorted(dry, reverse=True)
    assert dry.count(True) == 5
    assert all(query["fieldManager"] == "disttrain" for _, query in patches)
    store = desk.cluster.store
    (uid,) = {store.objects["jobs", "digits"]["metadata"]["uid"]}
    for plural in ("services", "configmaps", "networkpolicies"):
        assert store.objects[plural, "digits"]["metadata"]["ownerReferences"][0]["uid"] == uid
    assert "ownerReferences" not in store.objects["persistentvolumeclaims", "disttrain-runs"]["metadata"]


def test_a_refused_request_is_shown_and_leaves_nothing(desk: Desk) -> None:
    def quota(manifest: dict[str, Any]) -> str | None:
        return "exceeded quota: team, requested: count/jobs.batch=1" if manifest["kind"] == "Job" else None

    desk.cluster.store.refuse = quota
    result = desk.run("submit", "digits", "--image", "disttrain:test")
    assert result.exit_code == 78
    assert result.stderr == (
        "disttrain: the cluster refused Job digits: exceeded quota: team, requested: count/jobs.batch=1\n"
    )
    assert desk.cluster.store.objects == {}


def test_a_cluster_that_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.run("status", "digits").stderr.startswith("disttrain: namespace default has no job digits")
    result = desk.run("list", "--context", "other")
    assert (result.exit_code, result.stderr.count("\n")) == (78, 1)
    assert "Context 'other' not found" in result.stderr
    monkeypatch.setenv("KUBECONFIG", "nowhere.yaml")
    assert "no cluster to connect to" in desk.run("list").stderr
    config = desk.cluster.kubeconfig
    config.write_text(config.read_text().replace("http://127.0.0.1", "http://127.0.0.2"))
    monkeypatch.setenv("KUBECONFIG", str(config))
    result = desk.run("list")
    assert result.exit_code == 1
    assert result.stderr.startswith("disttrain: cannot reach the cluster at http://127.0.0.2")


def test_a_user_who_may_see_jobs_and_pods_alone(desk: Desk) -> None:
    desk.cluster.store.forbidden = {"jobsets", "trainjobs", "pytorchjobs", "workloads"}
    desk.submit(nodes="1")
    assert desk.run("list").stdout.startswith("digits  ")
    assert desk.run("status", "digits").exit_code == 0
    desk.cluster.store.forbidden = {"jobs"}
    result = desk.run("list")
    assert result.exit_code == 78
    assert result.stderr == (
        'disttrain: the cluster refused jobs: jobs is forbidden: User "me" cannot list resource "jobs"\n'
    )


def test_what_is_there_is_looked_at_before_anything_is_sent(desk: Desk) -> None:
    store = desk.cluster.store
    result = desk.run("submit", "digits", "--image", "disttrain:test", "--claim", "nothing")
    assert "--claim nothing: namespace default has no such claim" in result.stderr
    claim = {"metadata": {"name": "once"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
    store.put("persistentvolumeclaims", claim)
    result = desk.run("submit", "digits", "--image", "disttrain:test", "--claim", "once", "--nodes", "2")
    assert result.stderr.startswith("disttrain: --claim once: its mode is ReadWriteOnce: 2 nodes need ReadWriteMany")
    store.put("services", {"metadata": {"name": "digits"}, "spec": {}})
    result = desk.run("submit", "digits", "--image", "disttrain:test")
    assert "Service digits exists and is not disttrain's; give another name" in result.stderr
    assert not store.of("jobs")


def test_a_killed_pod_is_replaced_and_counted_and_a_disruption_is_not(desk: Desk) -> None:
    desk.submit("--max-restarts", "1")
    desk.wait_for_nodes(2)
    for number in range(3):  # more often than it may fail
        desk.cluster.kubelet.kill(desk.pod(1), disruption=True)
        desk.cluster.wait("a successor", lambda number=number: len(desk.cluster.pods()) == 3 + number)
        desk.wait_for_nodes(2)
    assert desk.cluster.failures() == 0
    desk.cluster.kubelet.kill(desk.pod(1))
    desk.cluster.wait("a successor", lambda: len(desk.cluster.pods()) == 6)
    desk.wait_for_nodes(2)
    assert desk.cluster.failures() == 1
    follower = desk.follow()
    desk.tell("done")
    end(follower)
    assert desk.exit_code == 0
    assert "node 1: disrupted: EvictionByEvictionAPI" in desk.said
    assert any(line.startswith("node 1: killed (exit 137") for line in desk.said)


@pytest.mark.parametrize(
    "code", [pytest.param(2, marks=pytest.mark.long), pytest.param(70, marks=pytest.mark.long), 78]
)
def test_what_would_fail_again_is_not_tried_again(desk: Desk, code: int) -> None:
    desk.submit()
    desk.wait_for_nodes(2)
    follower = desk.follow()
    desk.tell("exit-1", str(code))
    end(follower)
    assert desk.exit_code == code
    assert desk.said[-1].startswith("failed: Job has exceeded")
    assert len([pod for pod in desk.cluster.pods() if pod["metadata"]["name"].startswith("digits-1")]) == 1
    # The one that failed keeps its log, and no other pod runs on alone.
    assert desk.run("logs", "digits", "--no-follow", "--node", "1").stdout == "node 1 | node 1 begins\n"
    desk.cluster.wait("the other's end", lambda: desk.num_running() == 0)


def test_a_finished_run_is_not_a_failure_whatever_becomes_of_its_job(desk: Desk) -> None:
    """A node that was replaced or late may fail once the others have gone."""
    desk.submit()
    desk.wait_for_nodes(2)
    follower = desk.follow()
    desk.tell("exit-0", "0")
    desk.cluster.wait("the end of node 0", lambda: desk.num_running() == 1)
    desk.tell("exit-1", "78")
    end(follower)
    assert desk.exit_code == 0
    assert desk.said[-2].startswith("failed: Job has exceeded")
    assert desk.said[-1].startswith("the run is finished")


def test_a_token_that_expires_or_a_busy_server_leaves_the_job_alone(desk: Desk) -> None:
    desk.submit()
    desk.wait_for_nodes(2)
    follower = desk.follow()
    desk.cluster.wait("word of its start", lambda: "running: 2 of 2 nodes" in desk.said)
    desk.cluster.store.token = "new"
    end(follower)
    assert desk.exit_code == 1  # and not 78, which says that a retry is useless
    assert desk.said[-1] == (
        "the cluster refused pods: Unauthorized; the job itself is not affected. `disttrain k8s status digits` shows "
        "its state"
    )
    desk.cluster.store.token = "secret"
    follower = desk.follow()
    desk.cluster.wait("word of its start", lambda: desk.said.count("running: 2 of 2 nodes") == 2)
    desk.cluster.store.is_overloaded = True  # which passes
    desk.cluster.wait("word of that", lambda: desk.said[-1].endswith("handle the request; retrying"))
    desk.cluster.store.is_overloaded = False
    config = desk.cluster.kubeconfig
    config.write_text(config.read_text().replace("token: secret", "token: new"))  # by whoever logs in again
    desk.cluster.store.token = "new"
    desk.tell("done")
    end(follower)
    assert desk.exit_code == 0


def test_stop_asks_for_a_checkpoint_and_submit_goes_on(desk: Desk) -> None:
    desk.submit()
    desk.wait_for_nodes(2)
    follower = desk.follow()
    result = desk.run("stop", "digits")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "asked 2 nodes to save and stop"
    assert sorted(lines[1:3]) == [f"node {node}: stopped, checkpoint saved (exit 75)" for node in (0, 1)]
    assert lines[3].startswith("safe: the checkpoint is saved.")
    end(follower)
    assert desk.exit_code == 75
    assert "nothing was running" in desk.run("stop", "digits").stdout
    assert json.loads(desk.run("list", "--json").stdout)["jobs"][0]["state"] == "suspended"
    desk.submit()
    desk.wait_for_nodes(2)
    assert desk.cluster.failures() == 0


def test_stop_says_when_nothing_was_saved(desk: Desk) -> None:
    desk.submit("--stop-grace", "1", "--grace-period", "11")
    desk.wait_for_nodes(2)
    first = desk.pod(0)
    desk.cluster.kubelet.hurry = 11
    desk.cluster.kubelet.freeze(first)  # it hangs, until the grace period is over
    result = desk.run("stop", "digits")
    assert result.exit_code == 1
    assert "NOT saved: node 0 did not end by saving" in result.stdout


def test_a_job_in_a_queue_is_kueues_to_start(desk: Desk) -> None:
    store = desk.cluster.store
    desk.submit("--queue", "team-a")
    job = store.objects["jobs", "digits"]
    assert desk.run("status", "digits").stdout == "queued: Kueue has not admitted it yet\n"
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "digits", "uid": job["metadata"]["uid"]}
    workload = {"metadata": {"name": "job-digits-1", "ownerReferences": [owner]}, "spec": {"active": True}}
    with store.lock:  # Kueue admits it
        store.put("workloads", workload)
        job["spec"]["suspend"] = False
    desk.wait_for_nodes(2)
    assert desk.run("stop", "digits").exit_code == 0
    assert store.objects["workloads", "job-digits-1"]["spec"]["active"] is False  # or Kueue would start it again
    desk.submit("--queue", "team-a")
    assert store.objects["workloads", "job-digits-1"]["spec"]["active"] is True
    assert store.objects["jobs", "digits"]["spec"]["suspend"] is True


def test_ctrl_c_detaches(desk: Desk) -> None:
    command = [sys.executable, "-m", "disttrain_launch", "k8s", "submit", "digits", "--image", "disttrain:test"]
    with subprocess.Popen([*command, "--follow"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as user:
        assert user.stdout is not None
        seen = list(iter(user.stdout.readline, "node 0 begins\n"))
        user.send_signal(signal.SIGINT)
        rest, _ = user.communicate(timeout=240)
    assert seen[0] == "job digits is submitted to namespace default\n"
    assert "disttrain: detached; the job continues." in rest
    assert user.returncode == 0
    assert desk.num_running() == 1


def test_stop_now_leaves_the_claim_and_nothing_else(desk: Desk) -> None:
    desk.submit()
    desk.wait_for_nodes(2)
    follower = desk.follow()
    assert "is being deleted with its pods" in desk.run("stop", "digits", "--now").stdout
    end(follower)
    desk.cluster.wait("an empty cluster", lambda: not desk.cluster.pods())
    assert [plural for plural, _ in desk.cluster.store.objects] == ["persistentvolumeclaims"]
    deletions = [query for verb, _, query in desk.cluster.store.requests if verb == "DELETE"]
    assert deletions[0] == {"propagationPolicy": "Foreground"}


def test_logs_survive_lost_connections_and_replaced_pods(desk: Desk) -> None:
    desk.submit()
    desk.wait_for_nodes(2)
    desk.cluster.store.drop_logs_after = [3, 0, 2, 1]
    desk.tell("say-0", "".join(f"line {number}\n" for number in range(9)))
    follower = desk.follow(all_pods=True)
    desk.cluster.wait("lines", lambda: "0: line 8" in desk.lines)
    assert desk.cluster.store.drop_logs_after == []
    desk.tell("exit-1", "1")
    desk.cluster.wait("a successor", lambda: len(desk.cluster.pods()) == 3)
    desk.wait_for_nodes(2)
    desk.tell("done")
    end(follower)
    first = [line for line in desk.lines if line.startswith("0")]
    assert first == ["0: node 0 begins", *(f"0: line {number}" for number in range(9)), "0: node 0 ends"]
    second = [line for line in desk.lines if line.startswith("1")]
    assert second == ["1: node 1 begins", "1: node 1 begins", "1: node 1 ends"]


def test_logs_that_a_kubelet_has_rotated() -> None:
    from disttrain_launch.kubernetes.client import LostConnection
    from disttrain_launch.kubernetes.logs import lines_of

    whole = [f"2026-01-01T00:00:00.{number:09}Z line {number}" for number in range(9)]
    reads = [(whole[:5], True), (whole[3:7], True), (whole[3:8], True), (whole[6:], False)]

    class Rotating:
        def log(self, _pod: str, *, follow: bool) -> Any:
            lines, breaks = reads.pop(0)
            yield from lines
            if breaks:
                raise LostConnection("reset")

    found = list(lines_of(Rotating(), "pod", lambda: True, threading.Event()))  # type: ignore[arg-type]
    assert found == [f"line {number}" for number in range(9)]


def test_the_doctor_asks_what_is_allowed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(desk.cluster.kubeconfig))
    found = {finding["name"]: finding for finding in permissions(None, None)}
    assert {finding["status"] for finding in found.values()} == {"ok"}
    assert list(found) == ["k8s-submit", "k8s-status", "k8s-logs", "k8s-stop"]
    desk.cluster.store.forbidden = {"pods/log", "networkpolicies"}
    found = {finding["name"]: finding for finding in permissions(None, "default")}
    assert found["k8s-logs"]["status"] == "failure"
    assert found["k8s-logs"]["detail"] == "in namespace default you may not get pods/log"
    assert found["k8s-submit"]["detail"] == (
        "in namespace default you may not create networkpolicies, patch networkpolicies"
    )
    assert found["k8s-status"]["status"] == "ok"
    (nothing,) = permissions("other", None)
    assert (nothing["name"], nothing["status"]) == ("kubernetes", "failure")
    assert "Context 'other' not found" in nothing["detail"]
