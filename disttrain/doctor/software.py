"""Python and the libraries: there, and of a version that is supported."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from disttrain.doctor.finding import Finding, failure, ok

_TOLD = ("torch", "torchvision", "mlflow", "numpy", "safetensors")


def python() -> Iterator[Finding]:
    """The interpreter's version against what disttrain's own metadata ask for."""
    found = f"{platform.python_version()} at {sys.executable}"
    asked = metadata.metadata("disttrain")["Requires-Python"]
    if SpecifierSet(asked).contains(platform.python_version(), prereleases=True):
        yield ok("python", found)
    else:
        yield failure("python", f"{found}, and disttrain needs {asked}", "Install disttrain into a newer Python.")


def libraries() -> Iterator[Finding]:
    """The version of each library that disttrain depends on against the range that it supports."""
    needed = [Requirement(line) for line in metadata.requires("disttrain") or []]
    wrong, asked = [], []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing (needs {requirement.specifier})")
            asked.append(shlex.quote(f"{requirement.name}{requirement.specifier}"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} (needs {requirement.specifier})")
            asked.append(shlex.quote(f"{requirement.name}{requirement.specifier}"))
    if wrong:
        yield failure("libraries", "; ".join(wrong), f"{sys.executable} -m pip install {' '.join(asked)}")
    else:
        yield ok("libraries", ", ".join(f"{name} {metadata.version(name)}" for name in _TOLD))
