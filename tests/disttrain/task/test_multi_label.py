"""Several labels per sample: the metrics are scikit-learn's, and the loss is a sum over samples."""

from __future__ import annotations

import pytest
import torch

from disttrain.task.multi_label import MultiLabel, average_precisions


def test_the_metrics_are_scikit_learns_also_among_equal_scores() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(200, 4, generator=generator) < torch.tensor([0.5, 0.1, 0.9, 0.0])
    labels = MultiLabel(("a", "b", "c", "never"))
    for scale in (1.0, 2.0):
        logits = (torch.randn(200, 4, generator=generator) * scale).round(decimals=3 if scale == 1 else 0)
        sums = labels.score(logits, truth.float())
        found, details = labels.metrics(sums, 200), labels.details(sums, 200)
        precisions = [metrics.average_precision_score(truth[:, k].numpy(), logits[:, k].numpy()) for k in range(3)]
        f1 = [metrics.f1_score(truth[:, k].numpy(), (logits[:, k] > 0).numpy()) for k in range(3)]
        for key, wanted in (("per_class", precisions), ("f1_per_class", f1)):
            assert details[key].pop("never") is None
            assert list(details[key].values()) == pytest.approx(wanted)
        assert list(details["samples_per_class"].values()) == truth.sum(0).tolist()
        assert found["mean_average_precision"] == pytest.approx(sum(precisions) / 3)
        assert found["f1"] == pytest.approx(sum(f1) / 3)
        assert found["subset_accuracy"] == pytest.approx(
            metrics.accuracy_score(truth.int().numpy(), (logits > 0).int().numpy())
        )
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.float())
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        lines = labels.report(found, labels.details(sums, 200))
        assert len(lines) == 5
        assert lines[-1].split() == ["never", "no", "samples"]


def test_a_perfect_ranking_has_an_average_precision_of_one() -> None:
    truth = torch.tensor([[1], [0], [1]]).bool().numpy()
    assert average_precisions(torch.tensor([[0.9], [0.1], [0.8]]).numpy(), truth) == [1.0]
    third = average_precisions(torch.tensor([[0.1], [0.9], [0.2]]).numpy(), truth)
    assert third == [pytest.approx((1 / 2 + 2 / 3) / 2)]
