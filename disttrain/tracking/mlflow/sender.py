"""The training process's end of the sender: starts, reads and ends it. No call here waits for MLflow but `finish`.

The sender is a process, not a thread. Importing MLflow and making its database is seconds of Python code: on a thread
it held the interpreter's lock so much that a training loop beside it ran at less than half its speed for ten seconds,
with steps of 0.3 s instead of 0.02 s. A process can also be given short time limits and a low priority of its own, and
be killed at a deadline whatever its network does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from disttrain.layout import LAUNCHER_PID
from disttrain.recipe import ask_before_sending
from disttrain.recipe.home import home_folder
from disttrain.runs.redact import redact, split_credentials
from disttrain.tracking.mlflow.delivery_state import Backlog, backlog_of, load_state, state_for

_LOOK_EVERY_S = 0.1
_MOST_RESTARTS = 3
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
_START = "import sys; sys.path.append(sys.argv[1]); from disttrain.tracking.mlflow.sender_process import main; main()"
# MLflow's own defaults wait four minutes for a server that is not there. A user's own settings stand.
_SHORT_RETRIES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}
_SURROUNDINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "CUDA_VISIBLE_DEVICES": "",  # the GPUs are the training's
    "GIT_PYTHON_REFRESH": "quiet",
    LAUNCHER_PID: "",  # it ends by itself, also where its worker was killed: nothing that the run's code left behind
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # nothing is loaded there; should a library begin to, no code comes along
}


class MlflowSender:
    """Feeds MLflow from the journal in `run_dir`, in a process of its own.

    Args:
        run_dir: holds the journal; gets `mlflow.json`.
        uri: an MLflow server or database. Its credentials, if it has any, are written nowhere.
        experiment: name of the MLflow experiment.
        run_name: what a new MLflow run is called; the name of the run directory if None.
        warn: called with messages for the user, by `poll` and `finish`.
        beside_training: whether an outage is reported at once, since training continues.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        experiment: str,
        run_name: str | None,
        warn: Callable[[str], None],
        *,
        beside_training: bool = True,
    ) -> None:
        self._run_dir = run_dir
        self._warn = warn
        self._beside_training = beside_training
        self._outage = ""
        self._num_restarts = 0
        bare_uri, credentials = split_credentials(uri)
        self._place = redact(bare_uri)
        state_for(run_dir, self._place, experiment)  # stored from here on, should the sender never get that far
        self._credentials = credentials
        self._settings = {
            "run_dir": str(run_dir.absolute()),
            "uri": bare_uri,
            "experiment": experiment,
            "run_name": run_name or run_dir.absolute().name,
        }
        self._start()

    def _start(self) -> None:
        self._messages = b""
        # Ctrl-C and the signals of schedulers go to all processes of a job, but this one has to outlive the training:
        # it inherits a mask without them, so that there is no moment in which one could hit it.
        outlived = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, outlived)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, _PACKAGE_PARENT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**_SHORT_RETRIES, "HOME": str(home_folder()), **os.environ, **self._credentials, **_SURROUNDINGS},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._order(json.dumps(self._settings))

    def poll(self) -> None:
        """Pass on the sender's messages, and restart it if it was killed. Never waits."""
        if not self._hear():
            self._revive()

    def _revive(self) -> bool:
        """Restart the sender if it was killed, as the kernel may when memory is short; whether it was."""
        code = self._process.poll()
        if code is None or code >= 0 or self._num_restarts == _MOST_RESTARTS:
            return False
        self._num_restarts += 1
        self._close()
        what = f"the process that feeds MLflow was killed ({signal.Signals(-code).name})"
        last = "; it will not be restarted again" if self._num_restarts == _MOST_RESTARTS else ""
        self._warn(f"{what}: it is restarted, and resumes where it was{last}.")
        self._start()
        return True

    def _close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _hear(self) -> bool:
        """Pass on new messages; False once the sender has closed its output."""
        assert self._process.stdout is not None
        try:
            data = os.read(self._process.stdout.fileno(), 65536)
        except BlockingIOError:
            return True
        *lines, self._messages = (self._messages + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError):
                for level, message in json.loads(line).items():
                    self._pass_on(level, str(message))
        return bool(data)

    def _pass_on(self, level: str, message: str) -> None:
        was_down = bool(self._outage)
        if level in ("outage", "over"):
            self._outage = message if level == "outage" else ""
            if was_down == bool(self._outage) or not self._beside_training:
                return
        if level == "outage":
            message = (
                f"MLflow at {self._place} is not accepting the run at the moment ({message}). Training continues; the "
                "journal keeps everything for it."
            )
        self._warn(message)

    def hurry(self) -> None:
        """Training has ended: have the sender upload what there is at full speed, before it is waited for."""
        self._order("hurry")

    def finish(self, timeout_s: float, unless: Callable[[], bool] | None = None) -> Backlog:
        """Let the sender upload what it can within `timeout_s`, end it, and return what is still missing in MLflow.

        A server that does not answer is asked twice, not for the whole time. `unless` is asked again and again; once it
        is True, the wait is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._order(f"finish {max(deadline - time.monotonic(), 0.0)}")
            has_ended = self._heard_out(deadline, unless)
            if not has_ended:
                self._process.kill()
            self._process.wait()
            if not has_ended or not self._revive():
                break
        self._close()
        too_late = "" if has_ended else f"it was not done within {timeout_s:g} s"
        return backlog_of(self._run_dir, self._outage or too_late)

    def _heard_out(self, deadline: float, unless: Callable[[], bool] | None) -> bool:
        """Pass on the sender's messages until it ends; False if it has not by then."""
        assert self._process.stdout is not None
        while (left := deadline - time.monotonic()) > 0 and not (unless is not None and unless()):
            ready = select.select([self._process.stdout], [], [], min(left, _LOOK_EVERY_S))[0]
            if ready and not self._hear():
                return True
        return False

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already; `finish` finds that out
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


def backlog_at(run_dir: Path, uri: str, experiment: str) -> Backlog:
    """What MLflow at `uri` lacks of a run that was being sent there; nothing if it never was."""
    state = load_state(run_dir)
    place = redact(split_credentials(uri)[0])
    return backlog_of(run_dir) if (state.uri, state.experiment) == (place, experiment) else Backlog()


def deliver(
    run_dir: str | os.PathLike[str],
    uri: str | None = None,
    experiment: str | None = None,
    timeout_s: float = 60.0,
    warn: Callable[[str], None] = lambda message: None,
) -> Backlog:
    """Upload to MLflow what it still lacks of a run, and return what it lacks after that.

    Args:
        run_dir: a run directory with a journal.
        uri, experiment: where to; None for those the run had before. Credentials come with `uri`, or from
            MLFLOW_TRACKING_URI where that names the same server, or from MLFLOW_TRACKING_USERNAME and _PASSWORD.
        timeout_s: when to give up.
        warn: called with messages for the user.

    Raises ValueError if the run was never delivered anywhere and `uri` is None; ConfigurationError if the server that
    it had before would get credentials and is not named by MLFLOW_TRACKING_URI either.
    """
    state = load_state(run_dir)
    if not uri and state.uri:
        ask_before_sending(state.uri, Path(run_dir), "pass it as `uri`")
    uri = uri or state.uri
    known = os.environ.get("MLFLOW_TRACKING_URI")
    if known and redact(split_credentials(known)[0]) == uri:
        uri = known
    if not uri:
        raise ValueError(f"{run_dir}: this run has no MLflow server on record; name one")
    experiment = experiment or state.experiment or "disttrain"
    sender = MlflowSender(Path(run_dir), uri, experiment, None, warn, beside_training=False)
    return sender.finish(timeout_s)
