"""The sender's own process: follows the journal and feeds MLflow until the training process ends it or is gone.

Its standard input brings one line of JSON with the settings, later perhaps `hurry`, since training has ended and this
process will soon be waited for, and `finish SECONDS`; its end means that the training process is gone. Its standard
output carries one JSON object per line: {"warning": text}, {"outage": reason} when MLflow accepts nothing, and
{"over": text} when it does again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from disttrain.files import open_safely, open_to_read
from disttrain.layout import JOURNAL
from disttrain.runs.redact import redact
from disttrain.tracking.mlflow.chart_process import ChartProcess
from disttrain.tracking.mlflow.database import is_database
from disttrain.tracking.mlflow.orders import Orders
from disttrain.tracking.mlflow.outage import OutageError

if TYPE_CHECKING:
    from disttrain.tracking.mlflow.delivery import Delivery

LOCK_FILE = ".mlflow.lock"
_INTERVAL_S = 5.0  # between two deliveries
_MUCH_BYTES = 16384  # of the journal: 40 ms of MLflow's work, which at the end somebody would wait for
_LOOK_EVERY_S = 0.5  # whether the training process is still there, and how much it has written
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 30.0
# Pauses between the attempts at the end. A server that is down is asked twice; a database in a file may only be busy,
# as when several runs begin or end together.
_PAUSES_AT_THE_END_S = (0.5, 1.0, 2.0, 4.0, 4.0)
_NICENESS = 10


class Sender:
    """Delivers again and again; a circuit breaker keeps a dead server from being contacted all the time."""

    def __init__(self, delivery: Delivery, orders: Orders, voice: Voice, run_dir: Path, charts: ChartProcess) -> None:
        self._delivery = delivery
        self._orders = orders
        self._voice = voice
        self._charts = charts
        self._journal = run_dir / JOURNAL
        self._place = redact(delivery.uri)
        self._reason = ""  # why MLflow accepts nothing now
        self._synced = 0
        self._failure: Exception | None = None

    def run(self) -> None:
        """Deliver beside the training, and once more when it has ended."""
        # Beside the training a thread does it, whose priority is its own: to take it back may need root's rights.
        thread = threading.Thread(target=self._beside_training, name="disttrain-beside-training", daemon=True)
        thread.start()
        while thread.is_alive() and not self._orders.hurried:
            self._orders.wait_beside_training(_LOOK_EVERY_S)
        if not self._orders.over:
            self._charts.begin()  # while what they show is sent, and the model exported
        thread.join()
        if self._failure is not None:
            raise self._failure
        has_charts = bool(self._reason)
        if has_charts:  # before it is asked again: a server that does not answer may use up all the time there is
            self._draw_charts()
        elif not self._orders.over:
            self._attempt()
        while not self._orders.over:
            self._orders.wait(_LOOK_EVERY_S)
        pauses = _PAUSES_AT_THE_END_S if is_database(self._delivery.uri) else _PAUSES_AT_THE_END_S[:1]
        for pause_s in (*pauses, 0.0):
            if self._attempt():
                break
            time.sleep(pause_s)
        else:
            if not has_charts:
                self._draw_charts()
        if self._orders.abandoned:
            with contextlib.suppress(Exception):
                self._delivery.mark_killed()

    def _beside_training(self) -> None:
        try:
            self._deliver_beside_training()
        except Exception as error:  # for the main thread
            self._failure = error

    def _deliver_beside_training(self) -> None:
        backoff_s, is_first = _FIRST_BACKOFF_S, True
        while not self._orders.hurried:
            delivered = self._attempt()
            if is_first and not self._orders.hurried:
                self._charts.prepare()
                _give_way()
                _prepare()
            is_first = False
            if delivered:
                backoff_s = _FIRST_BACKOFF_S
                self._wait_for_more()
            else:
                self._orders.wait_beside_training(backoff_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def _wait_for_more(self) -> None:
        until = time.monotonic() + _INTERVAL_S
        while not self._orders.hurried and (left := until - time.monotonic()) > 0:
            self._orders.wait_beside_training(min(left, _LOOK_EVERY_S))
            if self._num_bytes_left() >= _MUCH_BYTES:
                return

    def _num_bytes_left(self) -> int:
        """How much of the journal MLflow does not have."""
        with contextlib.suppress(OSError):
            return self._journal.stat().st_size - self._delivery.offset
        return 0

    def _attempt(self) -> bool:
        self._sync()
        try:
            # Charts come last: the model is sent while they are drawn. Of a killed run they wait for its resume.
            self._delivery.deliver(charts=self._orders.over and not self._orders.abandoned)
        except OutageError as error:
            if str(error) != self._reason:
                self._reason = str(error)
                self._voice.say("outage", self._reason)
            return False
        if self._reason:
            self._reason = ""
            self._voice.say("over", f"MLflow at {self._place} has everything now.")
        return True

    def _draw_charts(self) -> None:
        """They are for readers of the run directory, too; an upload has drawn them already."""
        with contextlib.suppress(Exception):
            self._charts.drawn()

    def _sync(self) -> None:
        """Bring the journal to the disk: here, where it costs the training nothing."""
        with contextlib.suppress(OSError), open_to_read(self._journal) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self._synced:
                os.fsync(file.fileno())
                self._synced = size


def _give_way() -> None:
    """Let training go first from here on, as far as this thread goes: a priority is a thread's own on Linux.

    Not before the first attempt: MLflow's start takes seconds of processor time, and at a low priority they stretch
    over a minute in which every step suffers, or the end has to wait for them.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.nice(max(0, _NICENESS - os.nice(0)))


def _prepare() -> None:
    """Have ready what sending a model and many rows takes: at the end somebody waits for it."""
    import mlflow.pyfunc  # noqa: F401  # it is loaded when used, a tenth of a second

    from disttrain.tracking.mlflow import model  # noqa: F401

    gc.freeze()  # else what was imported is looked through for every few hundred rows, a fifth of their time


class Voice:
    """Messages to the training process."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, level: str, message: str) -> None:
        with contextlib.suppress(OSError):  # the reader is gone
            self._stream.write(json.dumps({level: redact(message)}) + "\n")
            self._stream.flush()


@contextlib.contextmanager
def sole_sender(run_dir: Path, orders: Orders) -> Iterator[bool]:
    """Hold the run directory's lock, so that two senders never write `mlflow.json`; False if another keeps it."""
    try:
        import fcntl
    except ImportError:  # Windows: two senders would repeat each other's work, which MLflow does not mind
        yield True
        return
    with os.fdopen(open_safely(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT), "r+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if orders.over:
                    yield False
                    return
                orders.wait(0.2)
            except OSError:  # a file system without locks
                yield True
                return
            else:
                yield True
                return


def main() -> None:
    """Run as a process by `MlflowSender`."""
    settings = json.loads(sys.stdin.readline())
    run_dir = Path(settings["run_dir"])
    # Before there are threads, and the stream of messages: whoever reads it would wait for this process as well.
    charts = ChartProcess(run_dir)
    # Libraries print what they like: standard output becomes nothing's, and the messages get a stream of their own.
    voice = Voice(os.fdopen(os.dup(sys.stdout.fileno()), "w"))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.dup2(nothing, sys.stderr.fileno())
    orders = Orders(sys.stdin)
    try:
        with sole_sender(run_dir, orders) as alone:
            if alone:
                _send(settings, run_dir, orders, voice, charts)
            else:
                voice.say("warning", f"another process is uploading {run_dir} to MLflow")
    except ImportError as error:
        voice.say("warning", f"MLflow cannot be used here ({error}); the journal keeps everything for it.")
    except Exception as error:
        voice.say("warning", f"the upload to MLflow ended early ({type(error).__name__}: {error}).")
    sys.stdout.flush()
    os._exit(0)  # MLflow's own threads and exit handlers have nothing left to do, but may take their time over it


def _send(settings: dict[str, str], run_dir: Path, orders: Orders, voice: Voice, charts: ChartProcess) -> None:
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    from disttrain.tracking.mlflow.delivery import Delivery

    delivery = Delivery(
        run_dir,
        settings["uri"],
        settings["experiment"],
        settings["run_name"],
        lambda message: voice.say("warning", message),
        charts.drawn,
    )
    Sender(delivery, orders, voice, run_dir, charts).run()
