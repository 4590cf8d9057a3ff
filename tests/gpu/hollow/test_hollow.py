"""PyTorch's own CUDA on a GPU that computes nothing: how often a step waits for it, and what is sent there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import hollow
from tests.gpu.hollow.steps import EVERY_STEP, ON_TWO, STEPS, TWO_STEPS

_WHY_NOT = hollow.why_not()
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)

FROM_THE_STEP_BEFORE = "distributed/later.py to_host_later.<locals>.read"
NUM_OTHERS = 4  # of the five steps of an epoch, without the first
WAITS_OF_A_LOOK = 2  # the copy to memory that is not pinned, and then PyTorch for its stream


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that has it."""
    folder = tmp_path_factory.mktemp("hollow")
    if why_not := hollow.why_not_in(folder):
        pytest.skip(why_not)
    return hollow.built(folder)


@pytest.fixture(scope="module")
def counts(gpu: dict[str, str]) -> dict[str, Any]:
    """What was counted in steps, by the names of the ways.

    Fails if whole runs mix tensors of two devices, or if one that runs out of memory names nothing that fits.
    """
    printed = hollow.python(["-m", "tests.gpu.hollow.steps"], gpu, timeout_s=600)
    lines = [line for line in printed.splitlines() if line.startswith("{")]  # whole runs print, too
    return {found.pop("name"): found for found in map(json.loads, lines)}


def of(kind: str, seen: dict[str, int]) -> dict[str, int]:
    return {name.removeprefix(f"{kind}: "): num for name, num in seen.items() if name.startswith(f"{kind}: ")}


@pytest.mark.parametrize("name", [name for name in STEPS if not name.startswith("exact")])
def test_a_step_of_fast_mode_waits_for_nothing_and_sends_nothing(name: str, counts: dict[str, Any]) -> None:
    """But for what the step before has sent: its own is sent then, in one copy."""
    others = counts[name]["others"]
    assert of("wait", others) == {FROM_THE_STEP_BEFORE: NUM_OTHERS}
    assert of("to the device", others) == {}
    assert of("to the host", others) == {"distributed/later.py to_host_later": NUM_OTHERS}


@pytest.mark.parametrize("name", ["exact", "exact with everything"])
def test_a_step_of_exact_mode_waits_once_however_many_slices_it_has(name: str, counts: dict[str, Any]) -> None:
    """For the counters of its sum; with a logged step's losses, which come when it has waited, once more."""
    waits = of("wait", counts[name]["others"])
    is_logged = name != "exact"
    assert waits.pop("training/loop.py train_step", 0) == is_logged * NUM_OTHERS * WAITS_OF_A_LOOK
    assert waits.pop("distributed/exact_sum.py holds") == NUM_OTHERS * WAITS_OF_A_LOOK
    assert waits == {FROM_THE_STEP_BEFORE: NUM_OTHERS}
    bounds = {"distributed/later.py from_host": NUM_OTHERS}
    assert of("to the device", counts[name]["others"]) == bounds


@pytest.mark.parametrize("name", STEPS)
def test_an_epoch_sends_its_order_and_an_evaluation_nothing(name: str, counts: dict[str, Any]) -> None:
    sent = of("to the device", counts[name]["next epoch"])
    assert sent.pop("data/sampler.py StepSampler.on") == 1
    assert set(sent) <= {"distributed/later.py from_host"}
    assert of("to the device", counts[name]["evaluation"]) == {}
    assert counts[name]["evaluation"].get("waits before its end", 0) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", ON_TWO)
def test_two_workers_train_on_two_gpus_save_and_resume(name: str, gpu: dict[str, str], tmp_path: Path) -> None:
    for last in (3, 4):
        overrides = (*TWO_STEPS, *EVERY_STEP, f"train.max_steps={last}", *ON_TWO[name])
        options = [word for override in overrides for word in ("-o", override)]
        command = ["-m", "disttrain_launch", "train", "cifar10-net", "-n", "2", "--run-dir", str(tmp_path), *options]
        printed = hollow.python(command, {**gpu, "HOLLOW_GPUS": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, timeout_s=400)
        assert "2 workers on cuda" in printed
    assert "resuming from step 3 of 4" in printed
