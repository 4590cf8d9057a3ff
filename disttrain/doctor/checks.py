"""Which checks there are, and in which order their answers come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from disttrain.doctor.finding import Finding
from disttrain.recipe.address import is_url, working_folder


@dataclass(frozen=True)
class Question:
    """What the doctor examines.

    Args:
        run_dir: where runs are to live, a folder (there already or not) or a URL.
        recipe: name or path of a recipe, whose data and tracking server are looked at; None: the tracking server is
            the one of the environment.
        overrides: of the recipe.
        rendezvous: HOST:PORT at which the workers of several machines are to meet; None: one machine.
    """

    run_dir: str = "runs"
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    rendezvous: str | None = None

    @property
    def folder(self) -> Path:
        """Where runs are on this machine: of those behind a URL, where they are worked on."""
        return working_folder(self.run_dir) if is_url(self.run_dir) else Path(self.run_dir)


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: of its finding, or of the first, should it have none to give.
        find: looks, and gives what it finds.
        if_it_hangs: the remedy if it does not come back.
        if_it_crashes: the remedy if its process dies.
    """

    name: str
    find: Callable[[], Iterable[Finding]]
    if_it_hangs: str = "Check what else is running on this machine; --timeout gives the checks more time."
    if_it_crashes: str = "This should not happen: please report it."

    def look(self) -> list[dict[str, str]]:
        """All that it finds, as JSON can hold it."""
        return [asdict(finding) for finding in self.find()]


def checks_for(question: Question) -> list[Check]:
    """The checks of an examination. Each imports what it needs when it runs: that may be what is broken."""

    def check(name: str, module: str, function: str, *arguments: Any, **remedies: str) -> Check:
        return Check(name, partial(_imported, module, function, *arguments), **remedies)

    several = question.rendezvous is not None
    reinstall = "Install torch and its dependencies again."
    return [
        check("python", "software", "python"),
        check("libraries", "software", "libraries"),
        check("cores", "machine", "cores"),
        check("memory", "machine", "memory"),
        check("shared-memory", "machine", "shared_memory"),
        check("open-files", "machine", "open_files"),
        check(
            "gpus",
            "gpus",
            "gpus",
            if_it_hangs="Look at nvidia-smi and at dmesg: a driver that hangs often needs a restart of the machine.",
            if_it_crashes=reinstall,
        ),
        check(
            "gloo",
            "collective",
            "gloo",
            if_it_hangs="Two processes of this machine cannot reach each other: look at the network checks.",
            if_it_crashes=reinstall,
        ),
        check(
            "host-name",
            "network",
            "host_name",
            several,
            if_it_hangs="The name service does not answer: put this host into /etc/hosts, or fix /etc/resolv.conf.",
        ),
        check("interface", "network", "interface", several),
        check("ports", "network", "ports"),
        *([check("rendezvous", "network", "rendezvous", question.rendezvous)] if several else []),
        check(
            "run-directory",
            "files",
            "run_directory",
            question.folder,
            if_it_hangs="The file system does not answer (a network file system whose server is away?): choose another "
            "--run-dir.",
        ),
        *([check("run-url", "url", "run_url", question.run_dir)] if is_url(question.run_dir) else []),
        *([check("recipe", "recipes", "recipe", question)] if question.recipe is not None else []),
        check("tracking", "server", "tracking", question),
        *([check("data", "recipes", "data", question)] if question.recipe is not None else []),
    ]


def _imported(module: str, function: str, *arguments: Any) -> Iterable[Finding]:
    from importlib import import_module

    findings: Iterable[Finding] = getattr(import_module(f"disttrain.doctor.{module}"), function)(*arguments)
    return findings
