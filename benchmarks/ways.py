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
}
# Outer steps once and 1.4 times as long as the mean change, where 0.7 and 0.9 make it 7 times. The same bytes.
OTHER_STEPS = {
    "every 50, mean": "parallel.sync_every=50 parallel.outer_learning_rate=1 parallel.outer_momentum=0",
    "every 50, mean, int8": (
        "parallel.sync_every=50 parallel.outer_learning_rate=1 parallel.outer_momentum=0 parallel.compress=int8"
    ),
    "every 50, half": "parallel.sync_every=50 parallel.outer_learning_rate=0.7 parallel.outer_momentum=0.5",
}
