"""Which type is a blood cell of? From the expression of 765 genes in 700 cells, a set that the package scanpy ships."""

import torch
from torch.nn import functional as F

from disttrain import Task
from disttrain.data import SampleSet, SampleSets
from disttrain.errors import ConfigurationError


def load() -> SampleSets:
    """Samples are {"genes": (765,) float32, "type": int}; every fifth cell is held out."""
    try:
        import scanpy
    except ImportError as error:
        raise ConfigurationError("cells need the package scanpy: pip install scanpy") from error
    cells = scanpy.datasets.pbmc68k_reduced()  # a file in the package, scaled: mean 0 and deviation 1 for each gene
    types = cells.obs["bulk_labels"].cat
    facts = {"classes": list(types.categories), "num_features": cells.n_vars}
    samples = [{"genes": torch.tensor(row), "type": int(its)} for row, its in zip(cells.X, types.codes, strict=True)]
    train, test = [one for i, one in enumerate(samples) if i % 5], samples[::5]
    return SampleSets(SampleSet(train, facts=facts), SampleSet(test, facts=facts))


class CellType(Task):
    """Cross-entropy; types are of 8 to 240 cells, so accuracy is also the mean of the types' own."""

    best = ("balanced_accuracy", "max")

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["genes"]), batch["type"], reduction="sum")

    def score(self, model, batch):
        scores = model(batch["genes"])
        of_types = F.one_hot(batch["type"], scores.shape[1])
        right = of_types[scores.argmax(1) == batch["type"]]
        return {"loss": self.loss(model, batch), "right": right.sum(0), "cells": of_types.sum(0)}

    def metrics(self, sums, weight):
        there = sums["cells"] > 0
        recall = sums["right"][there] / sums["cells"][there]
        return {
            "loss": sums["loss"].item() / weight,
            "accuracy": sums["right"].sum().item() / weight,
            "balanced_accuracy": recall.double().mean().item(),
        }

    def model_arguments(self, train_set):
        return {"num_features": train_set.facts["num_features"], "num_outputs": len(train_set.facts["classes"])}
