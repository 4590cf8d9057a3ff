"""Coverage of what runs in workers: measured there as at home, and merged there into what is measured at home.

At home it is coverage.py that measures, by itself (`coverage run`) or as pytest-cov has started it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """What is measured at home, as a worker needs it to do the same."""

    settings: dict[str, Any]  # what coverage.Coverage takes
    context: str  # what runs, in the words of pytest-cov's --cov-context


def wanted() -> Wanted | None:
    """At home: what to measure now; None if nothing is measured."""
    current = _current()
    if current is None:
        return None
    config = current.config
    settings = {
        "branch": config.branch,
        "config_file": config.config_file or False,
        "cover_pylib": config.cover_pylib,
        "include": config.run_include,
        "omit": config.run_omit,
        "source": config.source,
        "source_pkgs": config.source_pkgs,
    }
    return Wanted(settings, getattr(current._data, "_current_context", None) or "")


def add(measured: bytes | None) -> None:
    """At home: count what a worker measured as if it had run here."""
    current = _current()
    if measured is None or current is None:
        return
    from coverage import CoverageData

    data = CoverageData(no_disk=True)
    data.loads(measured)
    current._data.update(data)  # get_data() would look for files that were never run, each time
    data.close()


class Measuring:
    """In a worker: measures from one command to the next, while that is wanted."""

    def __init__(self) -> None:
        self._coverage: Any = None
        self._runs = False

    def follow(self, wanted: Wanted | None) -> None:
        """Begin, pause or resume, as home does."""
        if wanted is None:
            self._stop()
            return
        with _unwarned():
            if self._coverage is None:
                from coverage import Coverage

                while (inherited := Coverage.current()) is not None:  # of the fork server, which would never be saved
                    inherited.stop()
                self._coverage = Coverage(data_file=None, **wanted.settings)
            if not self._runs:
                self._coverage.start()
                self._runs = True
            self._coverage.switch_context(wanted.context)

    def take(self) -> bytes | None:
        """What was measured since the last time."""
        self._stop()
        coverage, self._coverage = self._coverage, None
        if coverage is None:
            return None
        with _unwarned():
            measured: bytes = coverage.get_data().dumps()
        return measured

    def _stop(self) -> None:
        if self._runs:
            self._coverage.stop()
            self._runs = False


def _current() -> Any:
    """The running coverage.Coverage. A process that has not imported it does not measure."""
    coverage: Any = getattr(sys.modules.get("coverage"), "Coverage", None)
    return coverage.current() if hasattr(coverage, "current") else None


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """No report of sources that this worker has not imported: another may have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
