"""Muon: momentum whose singular values are all brought near one before a step, for weights that are matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from disttrain.training.momentum import begin_momentum

Group = dict[str, Any]

_ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for weights of two or more dimensions; AdamW or SGD for all other parameters.

    A weight of more than two dimensions, as of a convolution, counts as a matrix of its first dimension by all others.
    Parameters of fewer than two dimensions, complex ones, and those of a group with `orthogonalised = False` are
    `other`'s. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; options and defaults that
    `torch.optim.Muon` has, too, are the same there.

    With `fused`, `other` is torch's fused one, and a step that `found_inf` says is bad leaves everything as it was, as
    a step of torch's fused optimizers does: the device decides, and nothing waits for it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        hold_norms: bool = False,
        other: str = "adamw",
        other_lr: float | None = None,
        other_weight_decay: float = 0.0,
        other_momentum: float = 0.9,
        other_betas: Sequence[float] = (0.9, 0.999),
        orthogonalised: bool = True,
        fused: bool | None = None,
    ) -> None:
        """`hold_norms`: before its step each weight is scaled to a norm of the square root of its rows.

        `orthogonalised` is for groups: whether their weights are, those that can be.
        """
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients), "eps": eps, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "hold_norms": hold_norms, "orthogonalised": orthogonalised,
        }  # fmt: skip
        of_other: dict[str, Any] = {"lr": lr, "weight_decay": other_weight_decay, "fused": fused}
        self._other: torch.optim.Optimizer
        if other == "sgd":
            of_other |= {"momentum": other_momentum, "nesterov": other_momentum > 0}
            self._other = torch.optim.SGD([torch.zeros(0)], **of_other)
        else:
            self._other = torch.optim.AdamW([torch.zeros(0)], **of_other, betas=(other_betas[0], other_betas[1]))
        given = list(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        matrices, others = _parted(groups, orthogonalised)
        for group in others:
            for option, value in self._other.defaults.items():
                group.setdefault(option, value)
            group["orthogonalised"] = False
            if other_lr is not None and lr > 0:
                group["lr_scale"] = group.get("lr_scale", 1.0) * other_lr / lr
        super().__init__([*matrices, *others], defaults)

    @property
    def heeds_found_inf(self) -> bool:
        """Whether every parameter stays as it is in a step that `found_inf`, () on the device, says is bad."""
        return all(group["orthogonalised"] or group["fused"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step by the gradients that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["orthogonalised"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        with _unchanged_if(found_inf, parameter, self._momentum_of(parameter)):
                            self._step_of(parameter, parameter.grad, group)
        # Set at each step: a checkpoint that was loaded has put others in the place of both.
        self._other.state = self.state
        self._other.param_groups = [group for group in self.param_groups if not group["orthogonalised"]]
        other: Any = self._other
        other.found_inf, other.grad_scale = found_inf, getattr(self, "grad_scale", None)
        if isinstance(other, torch.optim.SGD) and any(group["fused"] for group in other.param_groups):
            begin_momentum(other)
        other.step()
        return loss

    def _momentum_of(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer

    def _step_of(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        momentum, buffer = group["momentum"], self._momentum_of(parameter)
        buffer.lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        matrix = direction.reshape(len(direction), -1)
        update = orthogonalised(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])
        if group["hold_norms"] and group["lr"] > 0:  # a group whose epochs are over stays as it is
            parameter.mul_(math.sqrt(len(parameter)) / parameter.norm().clamp(min=group["eps"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = _ADJUSTMENTS[group["adjust_lr_fn"] or "original"](*matrix.shape)
        parameter.add_(update.view_as(parameter).to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float) -> torch.Tensor:
    """About the orthogonal matrix that is nearest to `matrix` (n, m): its singular vectors, with values near one.

    Each step of the iteration takes every singular value s to a s + b s^3 + c s^5. In bfloat16 on GPUs, whose bits it
    needs no more of, and in float32 on CPUs, where that is faster.
    """
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T  # the products below are then of the smaller side
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@contextmanager
def _unchanged_if(is_bad: torch.Tensor | None, *tensors: torch.Tensor) -> Iterator[None]:
    """Put back what the block writes to these tensors if `is_bad`, (), is 1, without a look at it; None: it is not."""
    if is_bad is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(is_bad == 1, old, tensor, out=tensor)


def _listed(params: Any) -> list[torch.Tensor]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _parted(groups: list[Group], default: bool) -> tuple[list[Group], list[Group]]:
    """Each group's matrices, and each one's other parameters; those without any are left out."""
    matrices, others = [], []
    for group in groups:
        found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for parameter in _listed(group["params"]):
            is_matrix = parameter.ndim >= 2 and not parameter.is_complex()
            found[is_matrix and group.get("orthogonalised", default)].append(parameter)
        matrices += [{**group, "params": found[True]}] if found[True] else []
        others += [{**group, "params": found[False]}] if found[False] else []
    return matrices, others
