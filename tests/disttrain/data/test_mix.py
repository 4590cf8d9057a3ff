"""Mixup and CutMix."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from disttrain import rng
from disttrain.data.mix import NUM_MIX, beta_quantile, mix


def batch(num: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image k is k everywhere and of class k, so that what it was mixed with can be read off it."""
    images = torch.arange(num).float().view(-1, 1, 1, 1).expand(-1, 2, 16, 12).contiguous()
    return images, torch.eye(num), rng.uniform(0, 0, torch.arange(num), NUM_MIX)


def mean_class(targets: torch.Tensor) -> torch.Tensor:
    return targets @ torch.arange(targets.shape[1]).float()


@pytest.mark.parametrize("kinds", [(0.4, 0.0), (0.0, 1.0), (1.0, 0.3)])
def test_an_image_and_its_target_are_mixed_in_the_same_shares(kinds: tuple[float, float]) -> None:
    images, targets, u = batch()
    mixed, shares = mix(images, targets, u, mixup=kinds[0], cutmix=kinds[1])
    assert torch.allclose(shares.sum(1), torch.ones(64), atol=1e-6)
    assert torch.allclose(mixed.mean((1, 2, 3)), mean_class(shares), atol=1e-4)
    assert ((shares > 0).sum(1) == 2).sum() > 48  # of two, where a sample was not drawn as its own partner
    assert shares.sum(0).min() > 0
    uniform = mixed.flatten(1).amax(1) == mixed.flatten(1).amin(1)
    if not kinds[0]:  # CutMix alone blends no pixel
        assert torch.equal(mixed, mixed.round())
        assert uniform.sum() < 48
    elif not kinds[1]:
        assert uniform.all()
    else:
        assert 16 < uniform.sum() < 48


def test_off_is_off_and_a_single_sample_stays_as_it_is() -> None:
    images, targets, u = batch(1)
    for mixup, cutmix in ((0.0, 0.0), (0.4, 0.0), (0.0, 0.4)):
        mixed, shares = mix(images + 3, targets, u, mixup=mixup, cutmix=cutmix)
        assert torch.equal(mixed, images + 3)
        assert torch.equal(shares, targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_have_the_moments_of_a_beta_distribution(alpha: float) -> None:
    shares = beta_quantile((torch.arange(4096) + 0.5) / 4096, alpha).double()
    assert shares.mean() == pytest.approx(0.5, abs=1e-3)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-2)


def test_a_mixed_target_is_learned_as_the_mixture_of_two_losses() -> None:
    images, targets, u = batch(8)
    _, shares = mix(images, targets, u, mixup=0.4, cutmix=0.0)
    torch.manual_seed(0)
    logits = torch.randn(8, 8)
    own = -(logits.log_softmax(1) * shares).sum()
    assert functional.cross_entropy(logits, shares, reduction="sum") == pytest.approx(own.item())
