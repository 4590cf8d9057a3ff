"""The model of what a step costs on the network, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.cost import HEADERS, Way, ways

BILLION, MEBI = 10**9, 2**20


def test_gradients_of_a_billion_numbers_take_ten_minutes_a_step_at_100_megabits() -> None:
    # 16 sites: each sends 2 * 15/16 * 4 GB = 7.5 GB, which is 60 Gbit.
    assert Way(4).bytes_per_step(BILLION, 16) == pytest.approx(7.5e9 * HEADERS)
    at_once = Way(4).seconds_per_step(BILLION, 16, bits_per_s=1e8, latency_s=0.0, computation_s=0.0)
    assert at_once == pytest.approx(600 * HEADERS)
    with_all = Way(4).seconds_per_step(BILLION, 16, bits_per_s=1e8, latency_s=0.1, computation_s=2.0)
    assert with_all == pytest.approx(2 + 600 * HEADERS + 77 * 30 * 0.1)  # 153 buckets


def test_outer_steps_send_a_fraction_of_it_and_fragments_a_fraction_at_once() -> None:
    all_ways = ways(every=50, fragments=4)
    sent = {name: way.bytes_per_step(MEBI, 2) / HEADERS for name, way in all_ways.items()}
    # Of two sites each sends the half that the other adds up, and then the half that it has added up itself.
    assert sent["float32"] == pytest.approx(4 * MEBI)
    assert sent["bf16"] == pytest.approx(sent["float32"] / 2)
    assert sent["every 50"] == sent["every 50, 4 fragments"] == pytest.approx(sent["float32"] / 50)
    assert sent["every 50, int8"] == pytest.approx(sent["every 50"] * (1 + 4 / 512) / 4)
    peaks = {name: way.peak_bytes(MEBI, 2) for name, way in all_ways.items()}
    assert peaks["every 50"] == pytest.approx(peaks["float32"])
    assert peaks["every 50, 4 fragments"] == pytest.approx(peaks["every 50"] / 4)


def test_messages_wait_for_each_other_around_the_ring_and_piece_by_piece() -> None:
    all_ways = ways(every=10, fragments=5)
    small = {name: way.messages_per_step(1000, 9) for name, way in all_ways.items()}
    assert small["float32"] == 16
    assert small["every 10"] == pytest.approx(3.2)  # what the numbers are at most, and their sum
    assert small["every 10, int8"] == pytest.approx(4.0)  # and a gather
    assert small["every 10, 5 fragments"] == pytest.approx(16)
    large = {name: way.messages_per_step(40 * MEBI, 9) for name, way in all_ways.items()}
    assert large["float32"] == 4 * 16  # seven buckets, two at a time
    assert large["every 10"] == pytest.approx((1 + 10) * 1.6)
    assert large["every 10, 5 fragments"] == pytest.approx(5 * (1 + 2) * 1.6)
