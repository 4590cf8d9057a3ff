"""Training on mixtures of two images and their labels, of whole batches at once.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017; Yun et al., "CutMix: Regularization Strategy to Train
Strong Classifiers with Localizable Features", 2019. As in `disttrain.data.augment`, each sample has numbers `u` of its
own, which decide on its partner, among the samples of its batch, and on its share.
"""

from __future__ import annotations

import torch

NUM_MIX = 5
"""How many numbers a sample gets: its rank among the partners, its share, which of the two kinds, a box's centre."""


def mix(
    images: torch.Tensor, targets: torch.Tensor, u: torch.Tensor, *, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample mixed with another of the batch; with both kinds on, either with probability one half.

    Args:
        images: (B, C, H, W) floating-point, normalised.
        targets: (B, K) floating-point, each row the probabilities of the classes, or zeros and ones.
        u: (B, NUM_MIX) in [0, 1).
        mixup, cutmix: the parameter alpha of the shares' Beta(alpha, alpha) distribution; 0 turns the kind off.
    """
    if not mixup and not cutmix:
        return images, targets
    partner = u[:, 0].argsort(stable=True)  # a permutation
    both = mixup > 0 and cutmix > 0
    blended = u[:, 2] < 0.5 if both else torch.full_like(u[:, 2], mixup > 0, dtype=torch.bool)
    share = torch.ones_like(u[:, 1])
    if mixup:
        share = torch.where(blended, beta_quantile(u[:, 1], mixup), share)
    mixed = images * share.view(-1, 1, 1, 1) + images[partner] * (1 - share).view(-1, 1, 1, 1)
    if cutmix:
        box = _boxes(images, beta_quantile(u[:, 1], cutmix), u[:, 3:5]) & ~blended[:, None, None]
        mixed = torch.where(box[:, None], images[partner], mixed)
        share = share - box.flatten(1).float().mean(1)  # what of the image is left: the box may stick out of it
    weight = share[:, None].to(targets.dtype)
    return mixed, targets * weight + targets[partner] * (1 - weight)


def beta_quantile(u: torch.Tensor, alpha: float) -> torch.Tensor:
    """The quantile `u` (B,) of the Beta(alpha, alpha) distribution, (B,) float32: so uniform numbers become shares."""
    if alpha == 1.0:
        return u
    from scipy.special import betaincinv  # comes with scikit-learn; imported only where it is used

    shares = betaincinv(alpha, alpha, u.double().cpu().numpy())
    return torch.from_numpy(shares).to(device=u.device, dtype=torch.float32)


def _boxes(images: torch.Tensor, share: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(B, H, W) bool: a box that leaves `share` of the image, (B,), around a centre anywhere in it, `u` (B, 2)."""
    height, width = images.shape[-2:]
    side = (1 - share).sqrt()
    inside = []
    for length, centre in ((height, u[:, 0]), (width, u[:, 1])):
        extent = (side * length).round()
        first = (centre * length).floor() - (extent / 2).floor()
        place = torch.arange(length, device=images.device) - first[:, None]
        inside.append((place >= 0) & (place < extent[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
