"""Where a worker's main thread is, as noted by the loop, read by the watchdog's threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Each note costs a few attributes: no lock, no clock, no I/O.

    `place` counts the stages entered, which all ranks enter in the same order: a rank with a lower one is behind.
    `ticks` counts every sign of life. `patient` stages may take as long as they take.
    """

    def __init__(self) -> None:
        self.stage = "starting"
        self.step = 0
        self.place = 0
        self.ticks = 0
        self.patient = True

    def at(self, stage: str, step: int, *, patient: bool = False) -> None:
        """Note that a stage begins, "step" for instance. Every rank must call it at the same points of the loop."""
        self.stage, self.step, self.patient = stage, step, patient
        self.place += 1
        self.ticks += 1

    def tick(self) -> None:
        """Note that the stage has made progress; what may take long, such as compiling, is then over."""
        self.ticks += 1
        self.patient = False

    @contextmanager
    def patiently(self, stage: str) -> Iterator[None]:
        """A stage that may take as long as it takes; afterwards the previous one continues."""
        before, was_patient = self.stage, self.patient
        self.at(stage, self.step, patient=True)
        try:
            yield
        finally:
            self.at(before, self.step, patient=was_patient)
