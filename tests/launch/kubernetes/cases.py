"""Requests whose whole manifests are kept in golden/. Write them anew: python -m tests.launch.kubernetes.cases"""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from disttrain_launch.cli import main

GOLDEN = Path(__file__).parent / "golden"
IMAGE = ["--image", "disttrain:latest"]

# What each folder of k8s/ comes to as a command.
FOLDERS = {
    "base": ["digits", "--nodes", "2", *IMAGE],
    "overlays/laptop-kind": [
        "digits", "--nodes", "2", *IMAGE, "--pull-policy", "Never", "--placement", "one-host",
        "--access-mode", "ReadWriteOnce", "--claim-size", "5Gi", "--cpu", "500m", "--memory", "2Gi",
        "--shm-size", "256Mi",
    ],
    "overlays/gpu": ["digits", "--nodes", "2", "--gpus", "8", *IMAGE, "--rdma", "rdma/hca=1"],
    "overlays/elastic": ["digits", "--nodes", "2:4", *IMAGE],
    "overlays/s3": [
        "digits", "--nodes", "2", *IMAGE, "--run-dir", "s3://disttrain-runs/digits", "--secret", "disttrain-storage",
    ],
}  # fmt: skip

EVERYTHING = [
    "cifar10-net", "-o", "train.epochs=3", "-o", "optim.lr=0.01", "--nodes", "4", "--gpus", "2", "--image",
    "registry.example/team/disttrain:0.1.0-cuda", "--name", "my-job", "--namespace", "research", "--queue", "team-a",
    "--claim", "shared-runs", "--run-dir", "/runs/team-a/my-job", "--secret", "mlflow", "--secret", "s3",
    "--env", "NCCL_DEBUG=INFO", "--rdma", "rdma/hca=1", "--topology-key", "topology.kubernetes.io/zone",
    "--node-selector", "gpu=h100", "--max-restarts", "5", "--stop-grace", "200", "--grace-period", "300",
    "--ttl", "3600", "--pull-secret", "registry", "--pull-policy", "Always", "--cpu", "7500m", "--memory", "64Gi",
    "--shm-size", "8Gi", "--workers", "1",
]  # fmt: skip

CASES = {name.replace("/", "-"): arguments for name, arguments in FOLDERS.items()} | {
    f"{kind}": [*EVERYTHING, "--kind", kind] for kind in ("job", "jobset", "trainjob", "pytorchjob")
}


def rendered(arguments: list[str]) -> str:
    """What `disttrain k8s render` prints."""
    result = CliRunner().invoke(main, ["k8s", "render", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


if __name__ == "__main__":
    for name, arguments in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(rendered(arguments))
