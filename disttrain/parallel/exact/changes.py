"""What a slice has changed in a model's buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def places_of_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each buffer is: the module that holds it and its name there, by its full name."""
    modules, places = dict(model.named_modules(remove_duplicate=False)), {}
    for full_name, _ in model.named_buffers():
        path, _, name = full_name.rpartition(".")
        places[full_name] = (modules[path], name)
    return places


def changes_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, may_look: bool) -> list[torch.Tensor | None]:
    """What a slice has added to each buffer (before, after), (elements,) float64; None, or zeros, for nothing.

    Infinite numbers and NaN may stay as they are. With `may_look` it is asked first which have changed.
    """
    changed = [not may_look or not torch.equal(before, after) for before, after in pairs]
    some = [pair for pair, is_changed in zip(pairs, changed, strict=True) if is_changed]
    if not some:
        return [None] * len(changed)
    before, after = (_in_a_row(side) for side in zip(*some, strict=True))
    stays = (before == after) | (before.isnan() & after.isnan())
    each = iter(torch.split(torch.where(stays, 0.0, after - before), [one.numel() for _, one in some]))
    return [next(each) if is_changed else None for is_changed in changed]


def _in_a_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All their numbers in one vector of float64: a few operations for all buffers, rather than some for each."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.double() for tensor in tensors]
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double()
