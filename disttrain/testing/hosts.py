"""Simulated machines: each a network namespace with its own address, joined by a bridge. Root on Linux.

    with cluster(3) as hosts:
        runs = [host.start(["torchrun", "--nnodes=3", ...]) for host in hosts]
        hosts[1].cut()                  # packets are dropped silently
        hosts[1].join()
        hosts[2].limit("10mbit")
        hosts[2].kill()                 # power off: the link first, so that no process says goodbye
        spare = hosts.replace(hosts[2]) # a fresh machine under the same name and address

The bridge lives in a namespace of its own: neither the routes nor the firewall of the real machine play a part, and
nothing of it can be reached from inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from disttrain.testing.errors import HarnessError, is_whole, wrong

_PREFIX = "disttrain"
_NETWORK = "10.111.0"
_NUMBERS = count()
_MOST_HOSTS = 254  # addresses of the network
# The name and the address book of the machine, then the command. $1 name, $2 hosts file.
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def why_not() -> str | None:
    """Why machines cannot be simulated here; None if they can."""
    if sys.platform != "linux":
        return "simulated hosts need Linux's network namespaces"
    if os.geteuid() != 0:
        return "simulated hosts need root, to make network namespaces"
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"simulated hosts need the command '{tool}' (packages iproute2 and util-linux)"
    return None


def check_num_hosts(num_hosts: object, argument: str) -> None:
    """Raise TypeError or ValueError if there cannot be this many machines."""
    if not is_whole(num_hosts) or not 1 <= num_hosts <= _MOST_HOSTS:  # type: ignore[operator]
        message = f"{argument} must be a whole number of machines, 1 to {_MOST_HOSTS}, not {num_hosts!r}"
        raise wrong(message, is_whole(num_hosts))


@dataclass(frozen=True)
class Host:
    """One simulated machine. Can be sent to a worker: it refers to its parts by name."""

    name: str
    address: str
    namespace: str
    switch: str = field(repr=False)  # the namespace of the bridge
    port: str = field(repr=False)  # this machine's port of the bridge
    directory: str = field(repr=False)  # holds the address book
    interface: str = "eth0"

    @property
    def parts(self) -> tuple[str, str, str]:
        """What makes a process one of this machine: its network namespace as a file, its name, its address book."""
        return f"/run/netns/{self.namespace}", self.name, f"{self.directory}/hosts"

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on this machine; `options` are those of subprocess.Popen. Ends with the cluster."""
        inside = ["unshare", "--uts", "--mount", "sh", "-c", _ENTER, "sh", self.name, f"{self.directory}/hosts"]
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *inside, *command], **options)

    def run(self, command: Sequence[str], timeout_s: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine to its end, and return its output as text.

        Raises subprocess.TimeoutExpired.
        """
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        with self.start(command, **settings) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    def cut(self) -> None:
        """Pull the cable behind the switch: packets vanish in both directions, and neither side notices."""
        _ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def join(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self.switch, "link", "set", self.port, "master", "bridge")

    def limit(self, rate: str | None) -> None:
        """Let no more than `rate` ("10mbit") pass in each direction; None for no limit."""
        for namespace, interface in ((self.namespace, self.interface), (self.switch, self.port)):
            if rate is None:
                _call("tc", "-n", namespace, "qdisc", "del", "dev", interface, "root", check=False)
            else:
                settings = ["rate", rate, "burst", "64kb", "latency", "400ms"]
                _call("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", "tbf", *settings)

    def pids(self) -> list[int]:
        """The processes that run on this machine."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace, check=False).split()]

    def kill(self) -> None:
        """Power off: the link goes first, so that the others receive nothing, then every process at once."""
        self.cut()
        for _ in range(100):
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        raise HarnessError(f"processes {self.pids()} of host {self.name} do not die")


class Cluster(Sequence[Host]):
    """The machines of a `cluster`, in order. Also makes spare ones."""

    def __init__(self, name: str, directory: str) -> None:
        self._name = name
        self._directory = directory
        self._switch = f"{name}-switch"
        self._hosts: list[Host] = []
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: Any) -> Any:
        return self._hosts[index]

    def add(self) -> Host:
        """One more machine, under a new name and address."""
        self._numbers += 1
        host = self._make(f"host-{self._numbers - 1}", f"{_NETWORK}.{self._numbers}")
        self._hosts.append(host)
        self._write_hosts()
        return host

    def replace(self, host: Host, same_address: bool = True) -> Host:
        """Power a machine off for good and put a fresh one in its place, under its own or under a new address."""
        place = self._hosts.index(host)
        host.kill()
        self._remove(host)
        if same_address:
            self._hosts[place] = self._make(host.name, host.address)
        else:
            self._numbers += 1
            self._hosts[place] = self._make(f"host-{self._numbers - 1}", f"{_NETWORK}.{self._numbers}")
        self._write_hosts()
        return self._hosts[place]

    def open(self) -> None:
        """Set up the bridge."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")

    def close(self) -> None:
        """Kill what runs on the machines, and take everything down."""
        for host in self._hosts:
            with contextlib.suppress(HarnessError):
                host.kill()
            self._remove(host)
        self._hosts.clear()
        _ip("netns", "del", self._switch, check=False)

    def _make(self, name: str, address: str) -> Host:
        number = next(_NUMBERS)
        host = Host(name, address, f"{self._name}-{name}-{number}", self._switch, f"port{number}", self._directory)
        namespace = host.namespace
        _ip("netns", "add", namespace)
        # A network card that belongs to the address: neighbours remember which card has which address for many seconds.
        card = ["address", f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"]
        _ip("-n", self._switch, "link", "add", host.port, "type", "veth", "peer", "eth0", *card, "netns", namespace)
        _ip("-n", self._switch, "link", "set", host.port, "master", "bridge", "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        return host

    def _remove(self, host: Host) -> None:
        _ip("-n", self._switch, "link", "del", host.port, check=False)
        _ip("netns", "del", host.namespace, check=False)

    def _write_hosts(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self._hosts)]
        Path(self._directory, "hosts").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def cluster(num_hosts: int) -> Iterator[Cluster]:
    """This many simulated machines for the block; afterwards no process, interface or namespace of theirs is left.

    Raises:
        TypeError, ValueError: that is not a number of machines.
        HarnessError: not on Linux, not root, or a tool is missing; `disttrain.testing.hosts.why_not()` checks first.
    """
    check_num_hosts(num_hosts, "num_hosts")
    reason = why_not()
    if reason is not None:
        raise HarnessError(reason)
    _clear_after_dead_processes()
    with tempfile.TemporaryDirectory(prefix="disttrain-hosts-") as directory:
        made = Cluster(f"{_PREFIX}-{os.getpid()}-{next(_NUMBERS)}", directory)
        try:
            made.open()
            for _ in range(num_hosts):
                made.add()
            yield made
        finally:
            made.close()


def _clear_after_dead_processes() -> None:
    """Take down what test runs left that were killed: namespaces of ours whose process has ended."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        parts = name.split("-")
        if parts[0] == _PREFIX and len(parts) > 2 and parts[1].isdigit() and not Path("/proc", parts[1]).exists():
            for pid in _ip("netns", "pids", name, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> str:
    return _call("ip", *arguments, check=check)


def _call(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise HarnessError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
