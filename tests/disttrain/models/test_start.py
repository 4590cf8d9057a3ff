"""Weights that are made rather than drawn, and the network that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from disttrain.errors import ConfigurationError
from disttrain.models import build_model, start
from disttrain.models.start import convolution_to_whiten, make_partial_identities, whitening_filters
from disttrain.recipe import parse_recipe


def test_partial_identities_pass_on_their_input_and_leave_the_other_filters_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False))
    before = [layer.weight.detach().clone() for layer in (model[0], model[1])]
    make_partial_identities(model, ["*"])
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(model[0](images)[:, :3], images)
    assert torch.equal(model[0].weight[3:], before[0][3:])
    features = torch.randn(2, 8, 6, 6)
    assert torch.allclose(model[1](features), features[:, :4])
    for patterns, message in (
        (["conv*"], r"model\.dirac: no convolution matches 'conv\*'"),
        (["0"], r"model\.dirac: '0' has 3 groups of filters"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_partial_identities(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3)), patterns)
    with pytest.raises(ConfigurationError, match="no convolution matches '0'; there are none"):
        make_partial_identities(nn.Sequential(nn.Linear(3, 6)), ["0"])


def test_whitening_filters_leave_no_correlation(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 2, 9, 8, generator=generator).cumsum(2).cumsum(3) / 9
    filters = whitening_filters([images], 2, 2, 3)
    assert filters.shape == (24, 2, 2, 3)
    assert torch.equal(filters[12:], -filters[:12])
    outputs = functional.conv2d(images, filters[:12]).transpose(0, 1).flatten(1)
    moments = outputs @ outputs.T / outputs.shape[1]
    assert (moments - moments.diagonal().diag()).abs().max() < 1e-4
    assert ((moments.diagonal() > 0.7) & (moments.diagonal() < 1.01)).all()

    seen: list[int] = []
    unfold = functional.unfold
    monkeypatch.setattr(functional, "unfold", lambda some, size: (seen.append(len(some)), unfold(some, size))[1])
    monkeypatch.setattr(start, "_MOST_NUMBERS", 12 * 72 * 40)
    assert torch.allclose(whitening_filters(torch.split(images, 256), 2, 2, 3), filters, atol=1e-5)
    assert seen == [40] * 6 + [16, 40, 4], "patches take many times the memory of their images"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("1", r"no two-dimensional convolution is called '1'; there are 0"),
        ("0", r"'0' has 8 filters of \(3, 2, 2\) in 1 group; it takes 24 in one"),
    ],
)
def test_a_layer_that_cannot_whiten_is_refused(layer: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"model\.whiten: {message}"):
        convolution_to_whiten(nn.Sequential(nn.Conv2d(3, 8, 2), nn.ReLU()), layer)


def test_airbench_has_the_size_of_the_papers_and_takes_other_images() -> None:
    model = build_model(parse_recipe({"model": {"name": "airbench"}}).model, num_classes=10, sample_shape=(3, 32, 32))
    # 1.97 million: Jordan, arXiv 2404.00498, section 3.1.
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_972_792
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    small = parse_recipe({"model": {"name": "airbench", "options": {"widths": [4, 6]}}}).model
    odd = build_model(small, num_classes=3, sample_shape=(1, 9, 14))
    assert odd(torch.randn(2, 1, 9, 14)).shape == (2, 3)
    with pytest.raises(ConfigurationError, match="'airbench' with 3 groups halves images 3 times, and these are 8 x 8"):
        build_model(parse_recipe({"model": {"name": "airbench"}}).model, num_classes=3, sample_shape=(1, 8, 8))
