"""Whether a connection counts as moving while no whole message comes, by what the kernel has counted."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator

import pytest

from split_common.transport.progress import LEAST_PROGRESS, UNFINISHED_BYTES, Progress, wire_size
from split_common.transport.tcp import COUNTED, inode, traffic
from wiretap import wait_until

pytestmark = pytest.mark.skipif(not COUNTED, reason="this system does not count a connection's bytes")

Ends = tuple[socket.socket, socket.socket, Progress]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A peer's end of a connection, the broker's, with small buffers, and what the peer knows."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as peer:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        peer.connect(server.getsockname())
        broker, _ = server.accept()
        with broker:
            for end in (peer, broker):
                end.setblocking(False)
            progress = Progress()
            progress.took(peer.fileno())
            yield peer, broker, progress


def fill(peer: socket.socket) -> None:
    """Writes until the kernel takes no more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            peer.send(bytes(64 * 1024))


def test_a_heartbeat_behind_what_is_sent_slowly(ends: Ends) -> None:
    peer, broker, progress = ends
    progress.gave(10_000_000)
    progress.gave(200, heartbeat=True)
    fill(peer)
    wait_until(progress.moves)
    wait_until(lambda: not progress.moves())
    # The network takes more.
    wait_until(lambda: _read(broker) == 0)
    fill(peer)
    wait_until(progress.moves)


@pytest.mark.parametrize("size", [200, 2000])
def test_a_kernel_that_takes_heartbeats_alone(ends: Ends, size: int) -> None:
    """A broker that hangs does not look alive, however many workers a heartbeat names."""
    peer, _, progress = ends
    sent = progress._handed
    for _ in range(5):
        peer.sendall(bytes(wire_size(size)))
        sent += wire_size(size)
        progress.gave(size, heartbeat=True)
        wait_until(functools.partial(_took, peer, sent))
        assert not progress.moves()


def test_a_message_that_arrives_slowly(ends: Ends) -> None:
    peer, broker, progress = ends
    assert not progress.moves()
    broker.sendall(bytes(LEAST_PROGRESS))
    wait_until(lambda: _read(peer) >= 0 and progress.moves())
    assert not progress.moves()


def test_a_message_without_an_end(ends: Ends) -> None:
    peer, broker, progress = ends
    left = UNFINISHED_BYTES + 1
    while left > 0:
        with contextlib.suppress(BlockingIOError):
            left -= broker.send(bytes(64 * 1024))
        _read(peer)
    wait_until(lambda: _read(peer) == 0 and not progress.moves())
    broker.sendall(bytes(8 * LEAST_PROGRESS))
    wait_until(lambda: _read(peer) > 0)
    assert not progress.moves()
    # A whole message came after all.
    progress.took(peer.fileno())
    broker.sendall(bytes(8 * LEAST_PROGRESS))
    wait_until(lambda: _read(peer) >= 0 and progress.moves())


def test_a_connection_that_ended(ends: Ends) -> None:
    peer, _, progress = ends
    progress.gave(10_000_000, heartbeat=True)
    fill(peer)
    peer.close()
    assert not progress.moves()


def _took(peer: socket.socket, size: int) -> bool:
    """Whether the kernel at the other end has taken so many bytes."""
    counted = traffic(peer.fileno(), inode(peer.fileno()))
    return counted is not None and counted.acknowledged >= size


def _read(peer: socket.socket) -> int:
    """Bytes that had arrived."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while data := peer.recv(1 << 20):
            count += len(data)
    return count
