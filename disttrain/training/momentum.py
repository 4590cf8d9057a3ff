"""Where fused SGD's momentum begins."""

from __future__ import annotations

import torch


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that get their first gradient in a step a momentum of zeros, which comes to the same.

    Left to itself, torch's fused SGD begins only with all at once, and counts a first step as made that `found_inf` has
    it leave out: the momentum is then what the memory held (`torch.optim.sgd._fused_sgd`, torch 2.11 to 2.14). With
    dampening it would not come to the same: a first gradient is not dampened.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] and not group["dampening"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
