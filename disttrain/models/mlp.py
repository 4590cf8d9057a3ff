"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from disttrain.errors import ConfigurationError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Mlp(nn.Sequential):
    """Hidden layers of `widths`, each followed by an activation and dropout, and a linear layer of `num_outputs`.

    Takes (B, num_features) float32 and gives (B, num_outputs). Raises ConfigurationError for arguments that make none.
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        widths: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ConfigurationError(
                f"model.options.activation: {activation!r} is not one of {', '.join(_ACTIVATIONS)}."
            )
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ConfigurationError(f"model.options.dropout: {dropout!r} is not a number of at least 0 and below 1.")
        if not isinstance(widths, Sequence) or not all(type(width) is int and width >= 1 for width in widths):
            raise ConfigurationError(f"model.options.widths: {widths!r} is not a list of whole numbers of 1 or more.")
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(num_features, width), _ACTIVATIONS[activation](), nn.Dropout(dropout)]
            num_features = width
        super().__init__(*layers, nn.Linear(num_features, num_outputs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, num_outputs): scores of classes, or quantities."""
        for layer in self:
            features = layer(features)
        return features
