"""`--max-restarts`: what is started again after a failure, how often, and when that is given up."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from disttrain.recipe import ExitCode
from disttrain_launch.cli.train import how_to_resume
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.outcome import Outcome
from disttrain_launch.restarts import Restarts
from tests.launch.conftest import StartLauncher

# Each start makes a step more, and fails in its own way until there are as many as it wants.
STEPS = """
run = Path("run")
run.mkdir(exist_ok=True)
def steps():
    return len(list(run.glob("checkpoints/step-*")))
def make_a_step():
    if rank == 0:
        (run / "checkpoints" / f"step-{steps() + 1:08d}").mkdir(parents=True)
"""


def test_a_failure_is_started_again_until_it_is_done(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(
        STEPS
        + """
if rank == 0:
    make_a_step()
    if steps() < 3:
        os.kill(os.getpid(), signal.SIGKILL)
while steps() < 3:
    time.sleep(0.01)
""",
        2,
        max_restarts=5,
    )
    returncode, _, err = launcher.end()
    assert returncode == 0
    said = err.splitlines()
    assert len(said) == 4
    for number in (1, 2):
        assert said[2 * number - 2].startswith("disttrain: rank 0 on ")
        assert "was killed by SIGKILL" in said[2 * number - 2]
        assert said[2 * number - 1] == f"disttrain: restart {number} of 5 from the latest checkpoint"


def test_no_more_often_than_allowed(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(STEPS + "\nmake_a_step()\nreport('out of luck', 1)", 1, max_restarts=2)
    returncode, _, err = launcher.end()
    assert returncode == 1
    assert err.count("out of luck") == 3
    assert err.count("restart ") == 2
    assert err.splitlines()[-1] == "disttrain: out of luck"


def test_a_failure_at_the_same_step_is_given_up_with_its_cause(start_launcher: StartLauncher) -> None:
    launcher = start_launcher("report('it always fails here', 1)", 1, max_restarts=9)
    returncode, _, err = launcher.end()
    assert returncode == 1
    assert err.splitlines() == [
        "disttrain: it always fails here",
        "disttrain: restart 1 of 9 from the latest checkpoint",
        "disttrain: it always fails here",
        "disttrain: it failed again without completing a step since the restart (step 0): giving up",
    ]


@pytest.mark.parametrize("code", [2, 70, 75, 78])
def test_what_a_retry_cannot_mend_is_not_retried(start_launcher: StartLauncher, code: int) -> None:
    launcher = start_launcher(STEPS + f"\nmake_a_step()\nreport('so it is', {code})", 1, max_restarts=3)
    returncode, _, err = launcher.end()
    assert (returncode, err) == (code, "disttrain: so it is\n")


def test_a_request_to_stop_ends_the_restarts(start_launcher: StartLauncher) -> None:
    launcher = start_launcher(
        STEPS
        + """
make_a_step()
if steps() < 2:
    os._exit(1)
signal.signal(signal.SIGTERM, lambda *_: report("stopped on request", 75))
here("ready")
time.sleep(60)
""",
        1,
        max_restarts=3,
    )
    launcher.wait_for("ready-0")
    launcher.send(signal.SIGTERM)
    returncode, _, err = launcher.end()
    assert returncode == 75
    assert err.splitlines()[-1] == "disttrain: stopped on request"


def test_a_loss_may_be_the_end_and_an_error_not() -> None:
    restarts = Restarts(5, None, stops_after_loss=True)
    assert restarts.helps(Outcome(ExitCode.FAILURE, "ValueError"))
    loss = Outcome(ExitCode.FAILURE, "was killed", is_loss=True)
    assert not restarts.helps(loss)
    assert restarts.settled(loss).exit_code == ExitCode.LOST
    assert Restarts(5).settled(loss) == loss
    assert restarts.gave_up == 'parallel.on_lost_worker is "stop": not restarting'


def test_how_a_run_that_a_loss_has_ended_is_resumed(tmp_path: Path) -> None:
    group = WorkerGroup((), 3, options="-n 3")
    assert how_to_resume(str(tmp_path), tmp_path, group) == ""
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert how_to_resume(str(tmp_path), tmp_path, group) == (
        f"the newest checkpoint is of step 7; resume with: disttrain train -n 3 --run-dir {tmp_path}"
    )


def test_how_far_a_run_has_come_is_seen_in_its_journal_too(tmp_path: Path) -> None:
    failure = Outcome(ExitCode.FAILURE, "killed")
    journal = tmp_path / "journal.jsonl"
    restarts = Restarts(5, tmp_path)
    journal.write_text(json.dumps({"kind": "metrics", "step": 4, "metrics": {}}) + "\n")
    assert restarts.helps(failure)
    with journal.open("a") as file:
        file.write(
            json.dumps({"kind": "metrics", "step": 5, "metrics": {}}) + "\nno json\n" + '{"kind": "metrics", "st'
        )
    assert restarts.helps(failure)
    assert not restarts.helps(failure)
    assert restarts.gave_up is not None
    assert "step 5" in restarts.gave_up


def test_a_wrong_digit_in_the_journal_ends_no_restarts(tmp_path: Path) -> None:
    restarts = Restarts(5, tmp_path)
    for steps in ([4], [900], [900, 5]):
        lines = [json.dumps({"kind": "metrics", "step": step, "metrics": {}}) + "\n" for step in steps]
        damaged = '{"metrics": {}, "step": 1e999}\n{"metrics": ' + "[" * 200_000 + "\n"
        (tmp_path / "journal.jsonl").write_text("".join(lines) + damaged)
        assert restarts.helps(Outcome(ExitCode.FAILURE, "killed"))
