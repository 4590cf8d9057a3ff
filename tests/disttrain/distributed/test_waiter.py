"""Waiting for another worker's socket."""

from __future__ import annotations

import socket

import pytest

from disttrain.distributed.waiter import Waiter


@pytest.mark.timeout(60)
def test_a_peer_whose_socket_a_forked_process_holds_is_not_waited_for_once_it_is_known_to_be_lost() -> None:
    """A run stood still until a daemon ended that user code in the killed worker had forked: 99 s in one case."""
    mine, peers = socket.socketpair()
    with mine, peers:  # nothing comes, and it is not closed: as of a worker whose child has it, too
        waiter, looks = Waiter(), iter([False, True])
        waiter.wait_for(mine, lambda: next(looks))
        mine.shutdown(socket.SHUT_RDWR)  # as whoever leaves the group does
        waiter.end()
