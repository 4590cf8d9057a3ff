"""Each mistake gets a line, before anything is sent and without a cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from disttrain_launch.cli import main
from disttrain_launch.kubernetes.quantities import amount


def render(*arguments: str, image: str = "disttrain:test") -> Result:
    """Run `disttrain k8s render digits`; a traceback fails the test."""
    result = CliRunner().invoke(main, ["k8s", "render", "digits", "--image", image, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", ""], "--image is missing: give the image that has disttrain and your code"),
        (["--image", "a b"], "--image a b: is not an image reference"),
        (["--name", "My_Job"], "--name My_Job: should be lower-case letters, digits and dashes"),
        (["--name", "1st"], "--name 1st: should be lower-case letters, digits and dashes"),
        (["--name", "a" * 62], "and a host name has at most 63 characters; give a name of at most 61"),
        (["--name", "a" * 61, "--nodes", "11"], "give a name of at most 60"),
        (["--name", "a" * 60, "--kind", "jobset"], "give a name of at most 54"),
        (["--name", "a" * 60, "--kind", "pytorchjob"], "give a name of at most 54"),
        (["--namespace", "a.b"], "--namespace a.b: should be"),
        (["--queue", "Team A"], "--queue Team A: is not the name of a Kueue LocalQueue"),
        (["--secret", "hunter2!"], "--secret hunter2!: is not the name of a Secret; give the name, not the password"),
        (["--cpu", "two"], "--cpu two: is not a quantity; give a number with a unit"),
        (["--cpu", "0"], "--cpu 0: is not a quantity"),
        (["--cpu", "-1"], "--cpu -1: is not a quantity"),
        (["--memory", "16GB"], "--memory 16GB: is not a quantity"),
        (["--memory", "16"], "--memory 16: is 16 bytes; give a unit, as in 16Gi"),
        (["--memory", "100m"], "--memory 100m: is 0.1 bytes; give a unit, as in 100Gi"),
        (["--shm-size", "8Gi"], "--shm-size 8Gi: counts towards --memory 4Gi; give less, or more memory"),
        (["--claim-size", "lots"], "--claim-size lots: is not a quantity"),
        (["--rdma", "hca=1"], "--rdma hca=1: hca is not a device resource, as in rdma/hca=1"),
        (["--rdma", "rdma/hca=0"], "--rdma rdma/hca=0: should be a whole number of devices"),
        (["--nodes", "0"], "--nodes 0:0: should be 1 to 1000 nodes"),
        (["--nodes", "4:2"], "--nodes 4:2: should be 1 to 1000 nodes, the fewest first"),
        (["--nodes", "2:4", "--kind", "jobset"], "--kind jobset has a fixed number of nodes"),
        (["--gpus", "2", "--workers", "3"], "--workers 3: more than --gpus 2; give one per GPU"),
        (
            ["--nodes", "3", "--workers", "2", "-o", "parallel.exact=true"],
            "--nodes 3: 6 workers, and in exact mode a step is shared by at most parallel.slices = 4",
        ),
        (
            ["--stop-grace", "90", "--grace-period", "60"],
            "--grace-period 60: the pod would be killed before its checkpoint is saved; give at least 100",
        ),
        (["--run-dir", "/data/run"], "--run-dir /data/run: should be a folder in /runs"),
        (["--run-dir", "/runs"], "--run-dir /runs: should be a folder in /runs"),
        (["--run-dir", "/runs/../etc"], "--run-dir /runs/../etc: should be a folder in /runs"),
        (["--run-dir", "s3://b/r", "--claim", "c"], "--claim c: --run-dir s3://b/r is a URL; give one of the two"),
        (
            ["--nodes", "2", "--access-mode", "ReadWriteOnce"],
            "--access-mode ReadWriteOnce: 2 nodes need ReadWriteMany; give such a claim, a URL as --run-dir, or",
        ),
        (
            ["--nodes", "2", "--access-mode", "ReadWriteOncePod", "--placement", "one-host"],
            "--access-mode ReadWriteOncePod: 2 nodes need ReadWriteMany",
        ),
        (["--env", "A-B=1"], "--env A-B: is not the name of a variable"),
        (["--env", "RANK=0"], "--env RANK: disttrain sets it itself"),
        (["--env", "MLFLOW_TRACKING_PASSWORD=x"], "would be readable in the manifest; put it into a Secret"),
    ],
)
def test_one_line_each(arguments: list[str], words: str) -> None:
    result = render(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("disttrain: ")
    assert words in result.stderr


def test_several_mistakes_have_several_lines() -> None:
    result = render("--name", "A", "--cpu", "x", "--nodes", "0")
    assert [line.split()[1] for line in result.stderr.splitlines()] == ["--name", "--cpu", "--nodes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "many"], "'many' is not a valid number of nodes; give N, or MIN:MAX."),
        (["--env", "A"], "'A' should be NAME=VALUE."),
        (["--kind", "pod"], "'pod' is not one of"),
        (["--gpus", "-1"], "-1 is not in the range"),
    ],
)
def test_what_the_command_line_itself_refuses(arguments: list[str], words: str) -> None:
    result = render(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_a_wrong_recipe() -> None:
    result = render("-o", "optim.lrr=1")
    assert (result.exit_code, result.stderr) == (78, "disttrain: -o optim.lrr: unknown key; did you mean optim.lr?\n")


def test_a_dry_run_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "nowhere")
    arguments = ["digits", "--image", "disttrain:test"]
    submitted = CliRunner().invoke(main, ["k8s", "submit", *arguments, "--dry-run"])
    assert submitted.exit_code == 0
    assert submitted.stdout == CliRunner().invoke(main, ["k8s", "render", *arguments]).stdout


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("2", 2.0),
        ("500m", 0.5),
        ("1.5Gi", 1.5 * 2**30),
        ("10M", 1e7),
        (".5", 0.5),
        ("1ki", None),
        ("", None),
        ("1e3", None),
    ],
)
def test_quantities(quantity: str, value: float | None) -> None:
    assert amount(quantity) == value


def test_rendering_imports_neither_torch_nor_a_client() -> None:
    code = (
        "import sys; from disttrain_launch.cli import main; main(standalone_mode=False)\n"
        "sys.exit(', '.join({'torch', 'numpy', 'mlflow', 'lightkube', 'httpx2'} & set(sys.modules)) or None)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "k8s",
        "render",
        "cifar10-net",
        "--nodes",
        "4",
        "--gpus",
        "8",
        "--image",
        "X",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("\nkind: ") == 5


@pytest.mark.parametrize("words", [[], ["render"], ["submit"], ["status"], ["logs"], ["stop"], ["list"]])
def test_help_says_a_sentence_of_every_command(words: list[str]) -> None:
    text = CliRunner().invoke(main, ["k8s", *words, "--help"]).stdout
    assert text.split("\n\n")[1].rstrip().endswith("."), text
