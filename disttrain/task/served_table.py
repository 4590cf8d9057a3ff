"""A tabular model with everything before and after it, as one module that can be exported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from disttrain.data.sources.columns import Category, Number, columns_from_json


class ServedTable(nn.Module):
    """From raw rows, (B, columns) float64, to quantities in their own units, (B, 1), or probabilities, (B, K) float32.

    A row holds one number for each column of `facts["columns"]`, in that order: a number as it is in the table, NaN
    where it is missing; of a category its place in the list of categories, anything else where it is unknown.
    """

    place: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    order: torch.Tensor

    def __init__(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        columns = columns_from_json(facts["columns"])
        numbers = [(place, column) for place, column in enumerate(columns) if isinstance(column, Number)]
        self.categories = [
            (place, len(column.categories)) for place, column in enumerate(columns) if isinstance(column, Category)
        ]
        self.register_buffer("place", torch.tensor([place for place, _ in numbers], dtype=torch.int64))
        self.register_buffer("mean", torch.tensor([column.mean for _, column in numbers], dtype=torch.float64))
        deviations = [column.std or math.inf for _, column in numbers]  # what has one value is 0
        self.register_buffer("std", torch.tensor(deviations, dtype=torch.float64))
        self.register_buffer("order", torch.tensor(_order(columns), dtype=torch.int64))
        self.is_class = "classes" in facts
        self.target_mean, self.target_std = facts.get("target_mean", 0.0), facts.get("target_std", 1.0)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, 1) or (B, K)."""
        numbers = rows.index_select(1, self.place)
        missing = numbers.isnan()
        standardised = torch.where(missing, 0.0, (numbers - self.mean) / self.std)
        one_hot = [rows[:, place, None] == torch.arange(num) for place, num in self.categories]
        blocks = [standardised.float(), missing.float(), *(block.float() for block in one_hot)]
        outputs: torch.Tensor = self.model(torch.cat(blocks, 1).index_select(1, self.order))
        return outputs.softmax(1) if self.is_class else outputs * self.target_std + self.target_mean


def _order(columns: Sequence[Number | Category]) -> list[int]:
    """Where each feature stands among: all numbers, all their indicators, the categories of each column."""
    num_numbers = sum(isinstance(column, Number) for column in columns)
    order: list[int] = []
    number, first_category = 0, 2 * num_numbers
    for column in columns:
        if isinstance(column, Number):
            order += [number, num_numbers + number] if column.indicator else [number]
            number += 1
        else:
            order += range(first_category, first_category + column.num_features)
            first_category += column.num_features
    return order


def example_rows(facts: Mapping[str, Any], num: int = 2) -> torch.Tensor:
    """`num` rows of what is ordinary in each column, (num, number of columns) float64."""
    columns = columns_from_json(facts["columns"])
    return torch.tensor(
        [
            [column.mean + row * column.std if isinstance(column, Number) else float(row % column.num_features)
             for column in columns]
            for row in range(num)
        ],
        dtype=torch.float64,
    )  # fmt: skip
