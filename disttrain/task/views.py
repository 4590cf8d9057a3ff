"""Several views of an image, whose scores are averaged: test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from disttrain.data import reflected


def over_views(scores: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, views: str) -> torch.Tensor:
    """The mean of the scores, (B, K), over views of `images`, (B, C, H, W), each view weighed as much as its mirror.

    "one": the image as it is, and nothing is averaged. "mirror": that and its mirror image. "mirror-translate": half of
    that, and half of the same for the image moved by a pixel up and left, and down and right; the edge is mirrored.
    """
    if views == "one":
        return scores(images)

    def of_both_sides(view: torch.Tensor) -> torch.Tensor:
        return (scores(view) + scores(view.flip(-1))) * 0.5

    centred = of_both_sides(images)
    if views == "mirror":
        return centred
    height, width = images.shape[-2:]
    padded = reflected(images, 1)
    moved = [padded[:, :, by : by + height, by : by + width].contiguous() for by in (2, 0)]
    return centred * 0.5 + (of_both_sides(moved[0]) + of_both_sides(moved[1])) * 0.25
