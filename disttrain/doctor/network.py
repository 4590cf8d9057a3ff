"""What workers need of the network: a name that resolves to this machine, an interface, ports, and the others."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator

import psutil

from disttrain.doctor.finding import Finding, Status, failure, ok, warning

_CONNECT_S = 5.0
_OWN_NAME = "Put the machine's address and name into /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface to use."
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def host_name(several: bool) -> Iterator[Finding]:
    """Whether the host's own name resolves to an address of this machine that others can reach, too.

    gloo binds to it and sends it to the other workers. Debian and Ubuntu resolve it to 127.0.1.1, which on every
    other machine is that machine itself. With `several` machines that is a failure.
    """
    name = socket.gethostname()
    bad: Status = "failure" if several else "warning"
    consequence = "" if several else "; enough for this machine alone"
    addresses = _addresses(name)
    if isinstance(addresses, str):
        yield Finding("host-name", bad, f"{name} cannot be resolved ({addresses}){consequence}", _OWN_NAME)
        return
    found = f"{name} is {', '.join(addresses)}"
    if not any(_is_ours(address) for address in addresses):
        yield Finding("host-name", bad, f"{found}, and this machine has no such address{consequence}", _OWN_NAME)
    elif all(ipaddress.ip_address(address).is_loopback for address in addresses):
        yield Finding("host-name", bad, f"{found}, which no other machine can reach{consequence}", _OWN_NAME)
    else:
        yield ok("host-name", found)


def interface(several: bool) -> Iterator[Finding]:
    """The network interface that gloo will use: the one that is set, else the one of the host name, else loopback."""
    present, up = psutil.net_if_addrs(), {name for name, state in psutil.net_if_stats().items() if state.isup}
    for variable in _INTERFACE_VARIABLES:
        for name in os.environ.get(variable, "").lstrip("^=").split(","):
            if name and os.environ[variable][0] != "^" and not any(known.startswith(name) for known in present):
                yield failure(
                    "interface",
                    f"{variable} names {name}, and there is no such interface",
                    f"Unset {variable}, or give one of {', '.join(sorted(present))}.",
                )
                return
    configured = os.environ.get("GLOO_SOCKET_IFNAME")
    if configured:
        where = f"{configured}, as GLOO_SOCKET_IFNAME says"
        chosen = configured.split(",")[0]
    else:
        addresses = _addresses(socket.gethostname())
        usable = [] if isinstance(addresses, str) else [address for address in addresses if _is_ours(address)]
        chosen = next((name for address in usable for name in present if _has(present[name], address)), _loopback())
        if usable:
            where = f"{chosen} ({usable[0]}), as the host name says"
        else:
            where = f"{chosen}, since the host name resolves to no interface"
    if chosen in present and chosen not in up:
        yield failure("interface", f"{where}, is down", f"Bring it up: ip link set {chosen} up")
    elif several and chosen == _loopback():
        others = sorted(up - {_loopback()}) or ["none, this machine has no other"]
        yield failure(
            "interface",
            f"{where}, which no other machine can reach",
            f"Set GLOO_SOCKET_IFNAME to the interface of the workers' network: {', '.join(others)}.",
        )
    else:
        yield ok("interface", where)


def ports() -> Iterator[Finding]:
    """A free port, listened on and connected to, as workers do to meet."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_S), server.accept()[0]:
                yield ok("ports", f"listened on port {port} of 127.0.0.1 and connected to it")
    except OSError as error:
        yield failure(
            "ports",
            f"127.0.0.1: {error}",
            "Bring the loopback interface up (ip link set lo up), or end what "
            "takes all ports (ss -s; the range is sysctl net.ipv4.ip_local_port_range).",
        )


def rendezvous(address: str) -> Iterator[Finding]:
    """Whether HOST:PORT can be reached, or, if HOST is this machine, be listened on."""
    host, _, text = address.rpartition(":")
    host, port = host.strip("[]"), int(text)
    addresses = _addresses(host)
    if isinstance(addresses, str):
        yield failure(
            "rendezvous",
            f"{host} cannot be resolved ({addresses})",
            "Give a name that every machine can resolve, or an address.",
        )
        return
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            yield ok("rendezvous", f"{address} answers")
    except ConnectionRefusedError:
        if any(_is_ours(one) for one in addresses):
            yield ok("rendezvous", f"{address} is this machine, and the port is free")
        else:
            yield warning(
                "rendezvous",
                f"{host} answers, but nothing listens on port {port}",
                "Fine if rank 0 has not started yet; otherwise the port is wrong, or a firewall blocks it.",
            )
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else str(error)
        yield failure(
            "rendezvous",
            f"{address} cannot be reached: {why}",
            "Start rank 0's machine, open the port in its firewall, and check the route between the two.",
        )


def _addresses(name: str) -> list[str] | str:
    """The addresses of a name, or why there are none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return str(error.args[-1])
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _is_ours(address: str) -> bool:
    """Whether a socket can be bound to the address: what gloo tries."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _has(entries: list[psutil._common.snicaddr], address: str) -> bool:
    return any(entry.address.partition("%")[0] == address for entry in entries)


def _loopback() -> str:
    return "lo" if "lo" in psutil.net_if_addrs() else "lo0"
