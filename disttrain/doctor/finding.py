"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Args:
        name: of what was looked at, in lower case with hyphens; it stays the same from version to version.
        status: "ok"; "warning": training works, but not everything or not everywhere; "failure": it cannot work.
        detail: what was found.
        remedy: what to do about it; empty if all is well.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", detail)


def warning(name: str, detail: str, remedy: str) -> Finding:
    """Training works, but not everything or not everywhere."""
    return Finding(name, "warning", detail, remedy)


def failure(name: str, detail: str, remedy: str) -> Finding:
    """Training cannot work like this."""
    return Finding(name, "failure", detail, remedy)
