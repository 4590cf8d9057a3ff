"""Test distributed code on one machine: real worker processes, quick, and with faults on demand.

With pytest, mark a test `@pytest.mark.distributed(world_size=2)` and its body runs in every worker of a real gloo
group. Without pytest, `run_workers` and `workers` do the same from Python. `faults` injures a run on purpose,
`small_disk` fills up, `proxy` stands before a server, `cluster` simulates machines. See docs/testing.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.testing import faults as faults
    from disttrain.testing.disk import small_disk as small_disk
    from disttrain.testing.errors import CollectivesDiffer as CollectivesDiffer
    from disttrain.testing.errors import HarnessError as HarnessError
    from disttrain.testing.errors import WorkerFailed as WorkerFailed
    from disttrain.testing.errors import WorkerTimeout as WorkerTimeout
    from disttrain.testing.group import Group as Group
    from disttrain.testing.group import Outcome as Outcome
    from disttrain.testing.group import run_workers as run_workers
    from disttrain.testing.group import workers as workers
    from disttrain.testing.hosts import Cluster as Cluster
    from disttrain.testing.hosts import Host as Host
    from disttrain.testing.hosts import cluster as cluster
    from disttrain.testing.ports import blackhole_port as blackhole_port
    from disttrain.testing.ports import refusing_port as refusing_port
    from disttrain.testing.proxies import Proxy as Proxy
    from disttrain.testing.proxies import proxy as proxy

_HOMES = {
    "CollectivesDiffer": "errors",
    "HarnessError": "errors",
    "WorkerFailed": "errors",
    "WorkerTimeout": "errors",
    "Group": "group",
    "Outcome": "group",
    "run_workers": "group",
    "workers": "group",
    "Cluster": "hosts",
    "Host": "hosts",
    "cluster": "hosts",
    "small_disk": "disk",
    "blackhole_port": "ports",
    "refusing_port": "ports",
    "Proxy": "proxies",
    "proxy": "proxies",
}
__all__ = ["faults", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import on first use: the pytest plugin next door must cost nothing to users who do not need it."""
    if name == "faults":
        return import_module("disttrain.testing.faults")
    if name in _HOMES:
        return getattr(import_module(f"disttrain.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
