"""What every test may ask for."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How fast the machine is says nothing about the code.
settings.register_profile("disttrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("disttrain")
os.environ["DISTTRAIN_TEST_TIMEOUT_S"] = "240"

# Tests are about CPUs: with one GPU, `auto` would have some workers take it and others not. All processes inherit it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """xdist sends UTF-8 alone, and ends the run at a report of anything else, as a file's name that is printed."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """The folder that holds `cifar-10-batches-py`, with real images; their md5 sums are not the published ones."""
    folder = os.environ.get("DISTTRAIN_TEST_CIFAR10")
    if not folder:
        pytest.skip("DISTTRAIN_TEST_CIFAR10 names no folder that holds cifar-10-batches-py")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_ignored() -> Iterator[None]:
    """What a test run ignores is ignored by every process it starts: SIGHUP under nohup, SIGINT in the background."""
    ours = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
