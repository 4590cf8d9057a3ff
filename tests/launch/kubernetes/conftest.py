"""A cluster whose pods run a stand-in for `disttrain node`, a shell script, where training is not the question."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from disttrain_launch.cli import main
from disttrain_launch.kubernetes import follow as following
from disttrain_launch.kubernetes.client import Cluster
from disttrain_launch.kubernetes.follow import follow
from tests.launch.kubernetes.fake_cluster import FakeCluster, fake_cluster

# Does what files in the run's folder tell it to; saves and exits 75 on SIGTERM.
_STAND_IN = """\
for word in "$@"; do
  case $word in --run-dir=*) run=${word#*=};; --node-rank=*) rank=${word#*=};; esac
done
mkdir -p "$run"
trap 'echo saved; exit 75' TERM
echo "node $rank begins"
while :; do
  if [ -e "$run/say-$rank" ]; then cat "$run/say-$rank"; rm "$run/say-$rank"; fi
  if [ -e "$run/exit-$rank" ]; then code=$(cat "$run/exit-$rank"); rm "$run/exit-$rank"; exit "$code"; fi
  if [ -e "$run/done" ]; then echo "node $rank ends"; exit 0; fi
  sleep 0.05
done
"""


class Desk:
    """What a user has: the command, and a view of the job that another terminal follows."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.run_dir = cluster.folder / "claims/disttrain-runs/digits"
        self.said: list[str] = []
        self.lines: list[str] = []
        self.exit_code: int | None = None

    def run(self, *arguments: str) -> Result:
        """`disttrain k8s …`; a traceback fails the test."""
        result = CliRunner().invoke(main, ["k8s", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    def submit(self, *arguments: str, nodes: str = "2") -> Result:
        """Submit `digits`; it must be accepted."""
        result = self.run("submit", "digits", "--image", "disttrain:test", "--nodes", nodes, *arguments)
        assert result.exit_code == 0, result.output
        return result

    def follow(self, *, all_pods: bool = False) -> threading.Thread:
        """Follow the job as `submit --follow` and `logs` do, in a thread."""
        client = Cluster(namespace="default")

        def work() -> None:
            self.exit_code = follow(
                client, "job", "digits", self.said.append,
                lambda pod, line: self.lines.append(f"{pod.node}: {line}"), all_pods=all_pods,
            )  # fmt: skip

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def tell(self, file: str, text: str = "") -> None:
        """Tell a pod what to do."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / f".{file}").write_text(text)
        (self.run_dir / f".{file}").rename(self.run_dir / file)

    def num_running(self) -> int:
        """How many pods run and have begun."""
        logs = self.cluster.store.logs
        running = [pod for pod in self.cluster.pods() if pod["status"]["phase"] == "Running"]
        return sum(bool(logs.get(pod["metadata"]["name"])) for pod in running)

    def wait_for_nodes(self, number: int) -> None:
        """Wait until that many pods run."""
        self.cluster.wait(f"{number} running pods", lambda: self.num_running() == number)

    def pod(self, node: int) -> str:
        """The name of the newest pod of a node."""
        names = [pod["metadata"]["name"] for pod in self.cluster.pods()]
        return str(max(name for name in names if name.startswith(f"digits-{node}-")))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A user with a kubeconfig for a cluster that is theirs."""
    (tmp_path / "stand-in.sh").write_text(_STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(following, "_POLL_S", 0.1)
    with fake_cluster(tmp_path, program=["sh", str(tmp_path / "stand-in.sh")]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield Desk(cluster)
