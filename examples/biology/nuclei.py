"""Is a tumour malignant? From thirty measurements of its cell nuclei: 569 patients in Wisconsin."""

import torch
from sklearn.datasets import load_breast_cancer
from torch.nn import functional as F

from disttrain import Task


def load():
    """(training set, test set) of {"nuclei": (30,) float32, "malignant": () float32}: 455 and 114 patients."""
    data = load_breast_cancer()
    train = torch.arange(len(data.target)) % 5 > 0
    nuclei, malignant = torch.tensor(data.data), torch.tensor(data.target == 0).float()
    nuclei = ((nuclei - nuclei[train].mean(0)) / nuclei[train].std(0)).float()  # what is held out decides nothing
    patients = [{"nuclei": one, "malignant": its} for one, its in zip(nuclei, malignant, strict=True)]
    return [patients[i] for i in train.nonzero()], [patients[i] for i in (~train).nonzero()]


class Diagnosis(Task):
    best = ("auc", "max")

    def loss(self, model, batch):
        logits = model(batch["nuclei"]).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, batch["malignant"], reduction="sum")

    def score(self, model, batch):
        logits = model(batch["nuclei"]).squeeze(1)
        return {"loss": self.loss(model, batch), "logits": logits.tolist(), "malignant": batch["malignant"].tolist()}

    def metrics(self, sums, weight):
        logits, malignant = torch.tensor(sums["logits"]), torch.tensor(sums["malignant"]) == 1
        ill, healthy = logits[malignant], logits[~malignant]
        return {
            "loss": sums["loss"].item() / weight,
            "auc": (ill[:, None] > healthy)
            .double()
            .mean()
            .item(),  # the share of pairs in which the malignant one scores higher
            "sensitivity": (ill > 0).double().mean().item(),
            "specificity": (healthy <= 0).double().mean().item(),
        }
