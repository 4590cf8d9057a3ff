"""Quantities as Kubernetes writes them: "500m", "2", "16Gi"."""

from __future__ import annotations

import re

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_SCALE = {"m": 1e-3, "": 1.0} | {
    prefix + suffix: float(base) ** power
    for power, prefix in enumerate(("k", "M", "G", "T", "P", "E"), start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}
_SCALE["Ki"] = _SCALE.pop("ki")


def amount(quantity: str) -> float | None:
    """The quantity as a number of cores, bytes or devices; None if it is none."""
    found = _QUANTITY.fullmatch(quantity)
    return float(found[1]) * _SCALE[found[2] or ""] if found else None
