"""BatchNorm over the global batch, on any device.

PyTorch's own SyncBatchNorm refuses CPU tensors; this one computes the same on gloo.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from disttrain.distributed.collectives import sum_


class _Sum(torch.autograd.Function):
    """The sum over all ranks. Every rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return sum_(gradients[0].clone())


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = _Sum.apply(tensor)
    return total


class GlooSyncBatchNorm(_BatchNorm):
    """BatchNorm whose mean and variance in training are those of all workers' samples.

    Samples: (B, C, ...); B may differ from worker to worker. Every rank must call it. The gradient flows through the
    all-reduce of the statistics, as in Ioffe and Szegedy (2015) on the whole batch.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input`, and move the running statistics as BatchNorm does."""
        if not self.training:
            return super().forward(input)
        dims = [dim for dim in range(input.dim()) if dim != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.new_full((1,), input.numel() / input.size(1))
        total = _sum(torch.cat([input.sum(dims), count]))
        num = total[-1].detach()
        mean = total[:-1] / num
        centred = input - mean.view(shape)
        variance = _sum(centred.square().sum(dims)) / num
        self._move_running_statistics(mean.detach(), variance.detach(), num)
        normalised: torch.Tensor = centred * (variance + self.eps).rsqrt().view(shape)
        if not self.affine:
            return normalised
        return normalised * self.weight.view(shape) + self.bias.view(shape)

    def _move_running_statistics(self, mean: torch.Tensor, variance: torch.Tensor, num: torch.Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (num / (num - 1).clamp(min=1)), momentum)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(input.shape)}")


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with each BatchNorm replaced by one over the global batch; parameters and names stay the same."""
    if device.type == "cuda":
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return synchronised
    if isinstance(model, _BatchNorm):
        converted = GlooSyncBatchNorm(
            model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats
        )
        converted.weight, converted.bias = model.weight, model.bias
        for name, buffer in model.named_buffers(recurse=False):
            setattr(converted, name, buffer)
        converted.train(model.training)
        return converted
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child, device))
    return model
