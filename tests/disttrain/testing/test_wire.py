"""The line between test process and workers."""

from __future__ import annotations

import os

import pytest

from disttrain.testing.wire import Channel


def test_messages_arrive_with_their_file_descriptors() -> None:
    ours, theirs = Channel.pair()
    reader, writer = os.pipe()
    ours.send({"numbers": list(range(1000))}, [writer])
    message, (received,) = theirs.receive()
    assert message == {"numbers": list(range(1000))}
    os.write(received, b"x")
    assert os.read(reader, 1) == b"x"
    for descriptor in (reader, writer, received):
        os.close(descriptor)


@pytest.mark.parametrize("unread", [False, True])
def test_an_end_that_goes_is_the_end_of_the_messages_whatever_it_left_unread(unread: bool) -> None:
    ours, theirs = Channel.pair()
    if unread:
        ours.send("never read")
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()
