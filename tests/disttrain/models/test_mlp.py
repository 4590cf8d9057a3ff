"""The multilayer perceptron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import ConfigurationError
from disttrain.models.mlp import Mlp


def test_layers_follow_from_the_widths() -> None:
    model = Mlp(5, 2, widths=[7, 3], dropout=0.5, activation="gelu")
    assert [type(layer) for layer in model] == [
        nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear,
    ]  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) == 5 * 7 + 7 + 7 * 3 + 3 + 3 * 2 + 2
    assert model(torch.zeros(4, 5)).shape == (4, 2)
    assert [type(layer) for layer in Mlp(5, 2, widths=[])] == [nn.Linear]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rlu"}, r"model\.options\.activation: 'rlu' is not one of relu, gelu"),
        ({"dropout": 1.0}, r"model\.options\.dropout: 1\.0 is not a number of at least 0"),
        ({"widths": 64}, r"model\.options\.widths: 64 is not a list of whole numbers"),
        ({"widths": [64, 0]}, r"model\.options\.widths: \[64, 0\] is not a list"),
    ],
)
def test_arguments_that_make_no_network_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Mlp(5, 2, **options)
