"""Commands whose scripts lie in `golden/`; `python -m tests.launch.slurm.cases` writes them anew."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from disttrain_launch.cli import main

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "two-nodes": ["cifar10-net", "--nodes", "2", "-n", "gpu", "--gpus", "8", "--time", "4:00:00", "--partition", "big"],
    "continuing": ["digits", "--nodes", "3", "-o", "parallel.exact=true"],
    "stopping": ["digits", "--nodes", "2", "-o", "parallel.on_lost_worker=stop"],
    "sweep": ["digits", "-n", "2", "--sweep", "optim.lr=0.1,0.01", "--sweep", "optim.momentum=0.8,0.9"],
    "everything": [
        "digits", "--name", "mine", "--run-dir", "/data/it's mine", "-o", "data.root=/data/$HOME", "--cpus", "4",
        "--mem", "16G", "--account", "lab", "--qos", "high", "--constraint", "a100&nvlink", "--warn", "300",
        "--stop-grace", "240", "--max-restarts", "9", "--sbatch", "exclusive", "--sbatch", "comment=two words",
    ],
}  # fmt: skip


def rendered(name: str) -> str:
    """What `disttrain slurm render` prints for a case."""
    done = CliRunner().invoke(main, ["slurm", "render", *CASES[name]])
    assert done.exit_code == 0, done.output
    return done.stdout


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case}.sh").write_text(rendered(case), encoding="utf-8")
