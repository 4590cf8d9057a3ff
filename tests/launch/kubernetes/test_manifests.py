"""What `disttrain k8s render` prints: whole, valid, safe, and the same as kustomize makes of k8s/."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from disttrain.errors import ExitCode
from disttrain_launch.cli import main
from disttrain_launch.kubernetes import kinds, source
from tests.launch.kubernetes.cases import CASES, FOLDERS, GOLDEN, IMAGE, rendered

ROOT = Path(__file__).parents[3]
VERSIONS = ("1.31", "1.37")  # the oldest with every field in use by default, and the newest known
Object = dict[str, Any]


def test_the_job_knows_what_exit_codes_mean() -> None:
    rules = source.base()["Job"]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert codes == {"Ignore": [ExitCode.STOPPED], "FailIndex": [2, 70, 71, 78]}


def objects(arguments: list[str]) -> dict[str, Object]:
    """The rendered objects by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(rendered(arguments))}


def pod_templates(found: Any) -> list[Object]:
    """Every pod template in an object, wherever its kind has it."""
    if isinstance(found, list):
        return [template for item in found for template in pod_templates(item)]
    if not isinstance(found, dict):
        return []
    if "containers" in found.get("spec", {}):
        return [found]
    return [template for value in found.values() for template in pod_templates(value)]


@pytest.mark.parametrize("name", CASES)
def test_whole_manifests(name: str) -> None:
    """If the change is meant: python -m tests.launch.kubernetes.cases, and look at the difference."""
    assert rendered(CASES[name]) == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", CASES)
def test_kubernetes_own_schemas_accept_them_strictly(name: str) -> None:
    """Native objects whole; of the other kinds the Jobs and pods in them."""
    for found in objects(CASES[name]).values():
        native = [found]
        if found["kind"] in ("JobSet", "TrainingRuntime"):
            spec = found["spec"] if found["kind"] == "JobSet" else found["spec"]["template"]["spec"]
            (replicated,) = spec["replicatedJobs"]
            native = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}} | replicated["template"]]
        elif found["kind"] in ("TrainJob", "PyTorchJob"):
            native = [{"apiVersion": "v1", "kind": "Pod"} | template for template in pod_templates(found)]
        for manifest in native:
            for version in VERSIONS:
                kubernetes_validate.validate(manifest, version, strict=True)


# The fields that the definitions of these kinds have, as far as they are in use here (JobSet v1alpha2, Kubeflow Trainer
# v1alpha1, training-operator v1).
CUSTOM: dict[str, dict[str, set[str]]] = {
    "JobSet": {
        "": {"suspend", "ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"},
        "network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
        "failurePolicy": {"maxRestarts"},
    },
    "TrainingRuntime": {"": {"mlPolicy", "template"}, "mlPolicy": {"numNodes"}, "template": {"spec"}},
    "TrainJob": {
        "": {"suspend", "runtimeRef", "trainer"},
        "runtimeRef": {"apiGroup", "kind", "name"},
        "trainer": {"numNodes"},
    },
    "PyTorchJob": {
        "": {"runPolicy", "pytorchReplicaSpecs"},
        "runPolicy": {"suspend", "backoffLimit", "cleanPodPolicy", "ttlSecondsAfterFinished"},
        "pytorchReplicaSpecs": {"Master", "Worker"},
    },
}


@pytest.mark.parametrize("kind", ["jobset", "trainjob", "pytorchjob"])
def test_other_kinds_use_only_fields_that_they_have(kind: str) -> None:
    found = objects(CASES[kind])
    for name in found.keys() & CUSTOM.keys():
        for section, fields in CUSTOM[name].items():
            spec = found[name]["spec"][section] if section else found[name]["spec"]
            assert set(spec) <= fields
        assert found[name]["apiVersion"] == kinds.PARTS[name].api_version
    assert "Service" not in found  # their controllers make it


@pytest.mark.parametrize("name", CASES)
def test_every_pod_is_restricted_and_finds_what_it_needs(name: str) -> None:
    found = objects(CASES[name])
    templates = pod_templates(list(found.values()))
    assert templates
    for template in templates:
        pod, (container,) = template["spec"], template["spec"]["containers"]
        # Pod Security, restricted
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(set(volume) & {"configMap", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])
        assert pod["automountServiceAccountToken"] is False
        # Everything written to is mounted, and everything mounted is there
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/home/disttrain", "/dev/shm", "/etc/disttrain"} <= set(mounts)
        assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        config = found["ConfigMap"]
        assert volumes["recipe"]["configMap"]["name"] == config["metadata"]["name"]
        recipe = container["args"][1]
        assert recipe.removeprefix("/etc/disttrain/") in config["data"]
        assert container["workingDir"] in mounts
        (run_dir,) = (word.partition("=")[2] for word in container["args"] if word.startswith("--run-dir="))
        assert "://" in run_dir or any(run_dir.startswith(f"{path}/") for path in mounts)
        # Quantities are strings, and the pod outlives its save
        for quantities in container["resources"].values():
            assert all(isinstance(quantity, str) for quantity in quantities.values())
        (grace,) = (word.partition("=")[2] for word in container["args"] if word.startswith("--stop-grace="))
        assert int(grace) + 10 <= pod["terminationGracePeriodSeconds"]
        # The pods, and they alone, reach each other
        policy = found["NetworkPolicy"]["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("jobset", "trainjob", "pytorchjob")])
def test_a_job_is_restarted_as_it_should_be(name: str) -> None:
    found = objects(CASES[name])
    job, service = found["Job"], found["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["maxFailedIndexes"], spec["podReplacementPolicy"]) == ("Indexed", 0, "Failed")
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never"
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailIndex"]  # disruptions first: they win
    assert [rule.get("onExitCodes", {}).get("values") for rule in rules] == [None, [75], [2, 70, 71, 78]]
    (container,) = pod["containers"]
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules[1:])
    # The first pod is found under the name that the others are given
    name, namespace = job["metadata"]["name"], job["metadata"].get("namespace")
    assert f"--rendezvous={name}-0.{service['metadata']['name']}:29400" in container["args"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert all(item["metadata"].get("namespace") == namespace for item in found.values())


def by_name(found: Any) -> Any:
    """The same, with lists of named things in the order of their names, which is all that strategic merge keeps."""
    if isinstance(found, dict):
        return {key: by_name(value) for key, value in found.items()}
    if isinstance(found, list):
        items = [by_name(item) for item in found]
        are_named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: str(item["name"])) if are_named else items
    return found


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_makes_the_same_of_the_folder(folder: str) -> None:
    made = subprocess.run(["kubectl", "kustomize", ROOT / "k8s" / folder], capture_output=True, text=True, check=True)
    expected = {found["kind"]: by_name(found) for found in yaml.safe_load_all(made.stdout)}
    assert {kind: by_name(found) for kind, found in objects(FOLDERS[folder]).items()} == expected


def test_the_recipe_in_base_is_the_shipped_one() -> None:
    text = (ROOT / "disttrain/recipes/digits.toml").read_text()
    assert source.base()["ConfigMap"]["data"] == {"digits.toml": text}


def test_what_uses_a_thing_comes_after_it() -> None:
    order = [found["kind"] for found in yaml.safe_load_all(rendered(["digits", *IMAGE]))]
    assert order == ["PersistentVolumeClaim", "ConfigMap", "NetworkPolicy", "Service", "Job"]
    runtime = [found["kind"] for found in yaml.safe_load_all(rendered(["digits", *IMAGE, "--kind", "trainjob"]))]
    assert ("TrainingRuntime", "TrainJob") in pairwise(runtime)


def test_a_recipe_of_your_own_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "My first_run.toml"
    path.write_text('[data]\ndataset = "digits"\n# kept\n')
    found = objects([str(path), *IMAGE])
    assert found["Job"]["metadata"]["name"] == "my-first-run"
    assert found["ConfigMap"]["data"] == {"My-first_run.toml": path.read_text()}
    assert found["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][1] == "/etc/disttrain/My-first_run.toml"


def test_kubernetes_fills_nothing_into_what_the_user_says() -> None:
    """It reads `$(NAME)` as the variable's value, and `$$` as `$`."""
    words = ["-o", "data.root=/d/$(POD_IP)$$x", "--run-dir", "/runs/$(HOME)"]
    arguments = objects(["digits", *IMAGE, *words])["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--override=data.root=/d/$$(POD_IP)$$$$x" in arguments
    assert "--run-dir=/runs/$$(HOME)" in arguments


def test_names_that_no_manifest_can_hold_are_refused() -> None:
    result = CliRunner().invoke(main, ["k8s", "render", "digits", *IMAGE, "--run-dir", "/runs/\udcff"])
    assert result.exit_code == 2
    assert "is not UTF-8, and manifests are text" in result.stderr
