"""The ways in which workers' gradients or weights meet that the benchmarks compare, as overrides of a recipe."""

from __future__ import annotations

WAYS = {
    "float32": "parallel.compress=none",
    "bf16": "parallel.compress=bf16",
    "fp16": "parallel.compress=fp16",
    "every 10": "parallel.sync_every=10",
    "every 50": "parallel.sync_every=50",
    "every 50, int8": "parallel.sync_every=50 parallel.compress=int8",
    "every 50, 4 fragments": "parallel.sync_every=50 parallel.sync_fragments=4",
    # With other outer steps than the default, 0.7 and 0.9: as long as the mean change, and three halves as long.
    "every 50, mean": "parallel.sync_every=50 parallel.outer_learning_rate=1 parallel.outer_momentum=0",
    "every 50, mean, int8": (
        "parallel.sync_every=50 parallel.outer_learning_rate=1 parallel.outer_momentum=0 parallel.compress=int8"
    ),
    "every 50, half": "parallel.sync_every=50 parallel.outer_learning_rate=0.7 parallel.outer_momentum=0.5",
}
