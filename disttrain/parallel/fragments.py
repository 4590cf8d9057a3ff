"""The fragments of a model that workers training apart synchronise at steps of their own (arXiv 2501.18512)."""

from __future__ import annotations

from collections.abc import Mapping

from disttrain.errors import ConfigurationError


class Fragments:
    """A model's tensors cut into fragments of about equal size, each of which the workers meet for every `every` steps.

    A layer, which is a module with parameters of its own, is in one fragment as a whole, buffers included: the largest
    layers are dealt out first, each to the fragment that is smallest then. So of equal blocks each has every
    `num_fragments`-th, the strided pattern of the paper. The fragments take turns: they are due 1, 2, 3... times
    `every` / `num_fragments` steps after each multiple of `every`, so the last one, or the only one, at multiples.
    """

    def __init__(self, sizes: Mapping[str, int], num_fragments: int, every: int) -> None:
        """`sizes`: how many numbers each parameter has, by name. Raises ConfigurationError for too few layers."""
        layers: dict[str, int] = {}
        for name, size in sizes.items():
            layers[_layer_of(name)] = layers.get(_layer_of(name), 0) + size
        if num_fragments > max(1, len(layers)):
            raise ConfigurationError(
                f"parallel.sync_fragments = {num_fragments}, and the model has {len(layers)} layers with weights, each "
                "of which is in one fragment: lower it."
            )
        self._last = num_fragments - 1
        self._of_layer: dict[str, int] = {}
        filled = [0] * num_fragments
        for layer in sorted(layers, key=lambda one: -layers[one]):  # of one size, in the model's order
            smallest = min(range(num_fragments), key=filled.__getitem__)
            self._of_layer[layer] = smallest
            filled[smallest] += layers[layer]
        self.largest_share = max(filled) / max(1, sum(filled))
        """The part of the parameters that the largest fragment has: the most that is sent at once."""
        self._every = every
        self._due = {(number + 1) * every // num_fragments % every: number for number in range(num_fragments)}

    def due_after(self, step: int) -> int | None:
        """The fragment that is due after this step, if one is; `step` counts the steps done before it."""
        return self._due.get((step + 1) % self._every)

    def num_never_due(self, num_steps: int) -> int:
        """How many fragments are not due within the first so many steps."""
        return sum((offset or self._every) > num_steps for offset in self._due)

    def of(self, name: str) -> int:
        """The fragment of a parameter or buffer; the last one has the buffers of modules without parameters."""
        return self._of_layer.get(_layer_of(name), self._last)


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]
