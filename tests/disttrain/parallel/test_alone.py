"""One worker alone."""

from __future__ import annotations

import torch

from disttrain.parallel.choose import parallelize
from disttrain.recipe import ParallelRecipe
from tests.disttrain.parallel.gradients import ALONE, assert_close, gradients_by_hand, gradients_of_an_epoch, network


def test_one_worker_computes_what_a_loop_by_hand_computes() -> None:
    strategy = parallelize(network(), ALONE, ParallelRecipe())
    assert_close(gradients_of_an_epoch(strategy, ALONE), gradients_by_hand())
    assert not strategy.follow_unfreezing()
    before = [buffer.clone() for buffer in strategy.model.buffers()]
    strategy.share_buffers_()  # without a process group: there is nobody to share them with
    assert all(map(torch.equal, before, strategy.model.buffers()))
