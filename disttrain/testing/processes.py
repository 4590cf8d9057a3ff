"""What Linux offers to make sure that no process is left behind; on other systems these do nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys

# Asks a worker for its stacks. faulthandler answers from C, even where Python hangs. A number that nothing else uses.
STACKS_SIGNAL: int = signal.SIGRTMAX - 1 if sys.platform == "linux" else signal.SIGUSR2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWNET = 0x40000000
_MADV_COLLAPSE = 25
_HUGE = 1 << 21
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which forked it, dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that it can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children() -> set[int]:
    """The process ids of this process's children. Empty where the system does not report them."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as listing:
                found.update(int(pid) for pid in listing.read().split())
    return found


def use_huge_pages() -> None:
    """Put this process's private memory into huge pages where the kernel can (Linux 6.1, MADV_COLLAPSE).

    A fork copies the page table, of a process that has imported torch 70,000 entries, and an exit takes it down. With
    huge pages a fork took 2.5 ms instead of 9.6, and an exit 4.2 instead of 11.4.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as mappings:
        lines = mappings.read().splitlines()
    for line in lines:
        addresses, access, _, _, inode, *name = line.split()
        if access != "rw-p" or inode != "0" or (name and name[0] != "[heap]"):
            continue
        first, last = (int(address, 16) for address in addresses.split("-"))
        start, end = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if start < end:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)  # may refuse: no matter


def num_threads() -> int:
    """Threads of this process as the kernel counts them; 1 where the system does not report them."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def move_to_host(network: str, name: str, addresses: str) -> None:
    """Make this process one of a simulated machine: its network namespace, its name, and its /etc/hosts.

    Raises OSError.
    """
    fd = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", fd, _CLONE_NEWNET)
    finally:
        os.close(fd)
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWUTS)
    socket.sethostname(name)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)  # what is mounted here stays here
    _call("mount", os.fsencode(addresses), b"/etc/hosts", None, _MS_BIND, None)


def _call(function: str, *arguments: int | bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def kill_group(pid: int) -> None:
    """SIGKILL to a worker's whole process group, itself included; silent if it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
