"""What a step costs on the network, derived from how the collectives work: bytes, messages one after another, seconds.

An all-reduce of n bytes over W sites is gloo's ring: each site sends 2 (W - 1) / W times n, in 2 (W - 1) messages that
each wait for the one before. The int8 exchange sends every site its share, (W - 1) / W times n at once, and gathers the
means in a ring, as much again in W - 1 messages. Of each packet 1448 bytes are theirs and 66 headers. What is large
goes in pieces, each with messages of its own: an outer step's wait for each other, of DDP's buckets gloo has two under
way.

    seconds per step = computation of one site + bits / rate + messages * latency

Communication is taken to wait for computation and the other way round: what overlaps makes a step shorter than this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from disttrain.parallel.outer import AT_ONCE

HEADERS = 1 + 66 / 1448  # Ethernet's, IP's and TCP's with its timestamps, in packets of 1514 bytes
BUCKET = 25 * 2**20  # bytes of float32 gradients that DDP sends together
_SCALES = 4 / 512  # bytes beside each number of 8 bits: a float32 for 512 of them


@dataclass(frozen=True)
class Way:
    """A way to meet: after every `every` steps, in `fragments` parts, one after another."""

    bytes_per_number: float
    every: int = 1
    fragments: int = 1
    agreements: int = 0
    """All-reduces of a few numbers before each meeting: an outer step's magnitudes."""
    at_once: int = 2 * BUCKET // 4
    """Numbers in a piece."""
    rings: float = 1
    """All-reduces of a piece that wait for each other; a gather is half of one."""

    def bytes_per_step(self, num_numbers: float, num_sites: int) -> float:
        """What each site sends for a step, on average."""
        return HEADERS * 2 * (num_sites - 1) / num_sites * self.bytes_per_number * num_numbers / self.every

    def peak_bytes(self, num_numbers: float, num_sites: int) -> float:
        """The most that a site sends at once, with fragments of one size."""
        return self.bytes_per_step(num_numbers, num_sites) * self.every / self.fragments

    def messages_per_step(self, num_numbers: float, num_sites: int) -> float:
        """How many messages wait for each other, on average."""
        num_pieces = math.ceil(num_numbers / self.fragments / self.at_once)
        rings_per_meeting = self.agreements + self.rings * num_pieces
        return 2 * (num_sites - 1) * rings_per_meeting * self.fragments / self.every

    def seconds_per_step(
        self, num_numbers: float, num_sites: int, *, bits_per_s: float, latency_s: float, computation_s: float
    ) -> float:
        """As the module has it."""
        bits = 8 * self.bytes_per_step(num_numbers, num_sites)
        return computation_s + bits / bits_per_s + self.messages_per_step(num_numbers, num_sites) * latency_s


def ways(every: int, fragments: int) -> dict[str, Way]:
    """What is compared, by name: gradients in each step, and outer steps."""

    def outer(num: int = 1) -> Way:
        return Way(4, every, num, agreements=1, at_once=AT_ONCE)

    def in_int8(num: int = 1) -> Way:  # a piece's scales are agreed on first
        return Way(1 + _SCALES, every, num, agreements=1, at_once=AT_ONCE, rings=1.5)

    return {
        "float32": Way(4),
        "bf16": Way(2),
        f"every {every}": outer(),
        f"every {every}, int8": in_int8(),
        f"every {every}, {fragments} fragments": outer(fragments),
        f"every {every}, {fragments} fragments, int8": in_int8(fragments),
    }
