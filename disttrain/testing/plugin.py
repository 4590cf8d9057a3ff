"""The pytest plugin: `@pytest.mark.distributed(world_size=2)` runs a test in every worker of a real gloo group.

Loaded by every pytest run where disttrain is installed, so it imports nothing but what pytest has imported already.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from disttrain.testing.hosts import Cluster

MARKER = "distributed"
_HELP = (
    "distributed(world_size=2, timeout_s=60.0, process_group=True, hosts=None, env=None, faults=(), "
    "check_collectives=True): run the test in every worker of a real gloo group; a list of world sizes parametrizes it "
    "(disttrain)."
)


def in_worker(config: pytest.Config) -> bool:
    """Whether this is pytest inside a worker, not the session that reports."""
    return "disttrain" in getattr(config, "workerinput", {})


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _HELP)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker(MARKER)
    sizes = mark and (mark.kwargs.get("world_size") or (mark.args[0] if mark.args else None))
    if isinstance(sizes, (list, tuple)):
        if "world_size" not in metafunc.fixturenames:
            metafunc.fixturenames.append("world_size")
        metafunc.parametrize("world_size", sizes, ids=[f"world_size={size}" for size in sizes])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the last to see what was made: other plugins replace items of theirs
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Generator[None, Any, Any]:
    made = yield
    if in_worker(collector.config) or not isinstance(made, list):
        return made
    if not any(isinstance(item, pytest.Item) and item.get_closest_marker(MARKER) for item in made):
        return made
    from disttrain.testing.item import distributed

    return [distributed(item) if item.get_closest_marker(MARKER) else item for item in made]


def pytest_collection_finish(session: pytest.Session) -> None:
    if in_worker(session.config) or session.config.option.collectonly:
        return
    marked = [item for item in session.items if item.get_closest_marker(MARKER)]
    if not marked:
        return
    if session.config.getoption("usepdb", False) or session.config.getoption("trace", False):
        raise pytest.UsageError(
            f"--pdb and --trace cannot reach into worker processes, and {len(marked)} of these tests run in workers "
            f"(the first is {marked[0].nodeid}). Leave them out with -m 'not {MARKER}', or run without --pdb: a "
            "failing rank shows its own traceback (-l adds the local variables)."
        )
    from disttrain.testing.pool import default_pool

    default_pool().start()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse what cannot run in workers: this test, not the others."""
    if in_worker(item.config) or item.get_closest_marker(MARKER) is None:
        return
    from disttrain.testing.item import DistributedFunction

    if not isinstance(item, DistributedFunction):
        pytest.fail(
            f"@pytest.mark.{MARKER} is for test functions and methods of plain classes, and this is a "
            f"{type(item).__name__} of unittest or another plugin; call disttrain.testing.run_workers in it instead",
            pytrace=False,
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let `run_workers` find the file whose test is running."""
    if in_worker(item.config) or not isinstance(item, pytest.Function):
        return (yield)
    from disttrain.testing.preload import PROVIDERS, pytest_preload

    def provider() -> Any:
        return pytest_preload(item)

    PROVIDERS.push(provider)
    try:
        return (yield)
    finally:
        PROVIDERS.remove(provider)


def pytest_unconfigure(config: pytest.Config) -> None:
    import sys

    if not in_worker(config) and "disttrain.testing.pool" in sys.modules:
        from disttrain.testing.pool import default_pool

        default_pool().forget(id(config))


def _of_worker(request: pytest.FixtureRequest, what: str) -> None:
    if not in_worker(request.config):
        pytest.fail(f"the fixture '{what}' exists in tests marked @pytest.mark.{MARKER} only", pytrace=False)


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> int:
    """The rank of this worker, in tests marked `distributed`."""
    _of_worker(request, "rank")
    return int(os.environ["RANK"])


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """The number of workers, in tests marked `distributed`."""
    _of_worker(request, "world_size")
    return int(os.environ["WORLD_SIZE"])


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """The simulated machines of a test marked `distributed(hosts=...)`."""
    _of_worker(request, "cluster")
    made: Cluster | None = getattr(request.config, "_disttrain_cluster", None)
    if made is None:
        pytest.fail(f"the fixture 'cluster' needs @pytest.mark.{MARKER}(hosts=...)", pytrace=False)
    return made
