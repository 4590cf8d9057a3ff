"""Four tasks as users write them, each with a small model and data of uneven sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import disttrain


class Language(disttrain.Task):
    """Samples: token ids, of any length. The loss is over tokens."""

    items = "tokens"

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        tokens = pad_sequence([torch.tensor(one) for one in samples], batch_first=True, padding_value=-100)
        return {"inputs": tokens[:, :-1].clamp(min=0), "targets": tokens[:, 1:]}

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return int((batch["targets"] != -100).sum())

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores, targets = model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten()
        return functional.cross_entropy(scores, targets, reduction="sum")

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        return {"loss": sums["loss"].item() / weight, "perplexity": math.exp(sums["loss"].item() / weight)}


class Detection(disttrain.Task):
    """Samples: an image (3, H, W) and boxes (n, 4) in cells, any n."""

    def collate(self, samples: list[Any]) -> Any:
        images, boxes = zip(*samples, strict=True)
        return torch.stack(images), list(boxes)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images, boxes = batch
        return torch.stack(
            [self._of_one(*one) for one in zip(model(images).to(images.dtype), boxes, strict=True)]
        ).sum()

    def _of_one(self, found: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        rows, columns = ((boxes[:, 1] + boxes[:, 3]) / 2).long(), ((boxes[:, 0] + boxes[:, 2]) / 2).long()
        there = torch.zeros_like(found[0]).index_put((rows, columns), boxes.new_ones(len(boxes)))
        presence = functional.binary_cross_entropy_with_logits(found[0], there, reduction="sum")
        return presence + functional.l1_loss(found[1:, rows, columns].T, boxes, reduction="sum")

    def score(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        images, boxes = batch
        peaks = [one.amax().item() for one in model(images)[:, 0]]
        return {"loss": self.loss(model, batch), "boxes": torch.tensor(sum(map(len, boxes))), "peaks": peaks}

    def metrics(self, sums: Any, weight: int) -> dict[str, float]:
        middle = sorted(sums["peaks"])[len(sums["peaks"]) // 2]
        return {"loss": sums["loss"].item() / weight, "median": middle, "boxes": sums["boxes"].item()}


class Speech(disttrain.Task):
    """Samples: frames (T, F) and letters (L,), of any length; CTC."""

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        frames, letters = zip(*samples, strict=True)
        lengths = torch.tensor([(len(one), len(its)) for one, its in samples])
        padded = pad_sequence(list(frames), batch_first=True), pad_sequence(list(letters), batch_first=True)
        return {"frames": padded[0], "letters": padded[1], "lengths": lengths}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = model(batch["frames"]).log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(scores, batch["letters"], *batch["lengths"].unbind(1), reduction="sum")


class Regression(disttrain.Task):
    """Samples: features and a value."""

    best = ("mae", "min")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        features, values = batch
        return functional.mse_loss(model(features).squeeze(1), values, reduction="sum")

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        features, values = batch
        errors = model(features).squeeze(1) - values
        return {"loss": errors.square().sum(), "mae": errors.abs().sum()}


@dataclass(frozen=True)
class Case:
    """A task with what it is tried on."""

    task: disttrain.Task
    model: nn.Module
    train_set: Any
    test_set: Any


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(20, 12), nn.GRU(12, 12, batch_first=True)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(12, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.dropout(self.body(self.embedding(tokens))[0]))
        return scores


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv1d(6, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.body(frames.transpose(1, 2)).relu().transpose(1, 2))
        return scores


def _int(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def language() -> Case:
    """Texts of 3 to 11 tokens."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 20, (49,), generator=generator).tolist()
    texts = [[(start + place) % 20 for place in range(_int(generator, 3, 12))] for start in starts]
    return Case(Language(), Recurrent(), texts[:38], texts[38:])


def detection() -> Case:
    """Images with 0 to 3 boxes, and a model with BatchNorm."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(49):
        corners = torch.randint(0, 5, (_int(generator, 0, 4), 2), generator=generator).float()
        data.append((torch.rand(3, 8, 8, generator=generator), torch.cat([corners, corners + 2], 1)))
    body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
    return Case(Detection(), body, data[:38], data[38:])


def speech() -> Case:
    """Utterances of 12 to 19 frames with 2 to 4 letters."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(49):
        letters = torch.randint(1, 5, (_int(generator, 2, 5),), generator=generator)
        data.append((torch.randn(_int(generator, 12, 20), 6, generator=generator), letters))
    return Case(Speech(), Convolution(), data[:38], data[38:])


def regression() -> Case:
    """Rows of 10 features."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(49, 10, generator=generator)
    data = list(zip(features, features.sum(1).sin(), strict=True))
    return Case(Regression(), nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)), data[:38], data[38:])


CASES: dict[str, Callable[[], Case]] = {
    "language": language, "detection": detection, "speech": speech, "regression": regression,
}  # fmt: skip


def case(name: str) -> Case:
    """The case of this name, with the same weights each time."""
    torch.manual_seed(0)
    return CASES[name]()


def in_float64(one: Case) -> Case:
    """The case in float64, and without what depends on how a batch is shared: dropout and BatchNorm."""
    for module in one.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = one.model
    if isinstance(model, nn.Sequential):
        model = nn.Sequential(*(layer for layer in model if not isinstance(layer, nn.BatchNorm2d)))
    return Case(one.task, model.double(), _doubled(one.train_set), _doubled(one.test_set))


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(_doubled(one) for one in value) if isinstance(value, list | tuple) else value


def regression_sets() -> tuple[Any, Any]:
    """What a recipe's data.dataset may name."""
    one = case("regression")
    return one.train_set, one.test_set


def regression_model() -> nn.Module:
    """What a recipe's model.name may name."""
    return case("regression").model
