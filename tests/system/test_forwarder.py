"""The slow network of `benchmarks.wan`: how its packets travel. No namespace is needed for that."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator

import pytest

from benchmarks.forwarder import BURST, Direction, Weather
from benchmarks.network import Network
from wiretap import wait_until

#: Bits per second, so that a packet of 1,000 bytes takes the link 10 ms.
RATE = 800_000.0
PACKET = bytes(1000)
NOW = 100.0


Link = tuple[Direction, socket.socket, socket.socket]


@pytest.fixture
def link() -> Iterator[Link]:
    """A direction, the end from which it takes packets, and the one where it delivers them."""
    sender, source = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sink, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, source, sink, receiver:
        for each in (source, sink, receiver):
            each.setblocking(False)
        yield Direction(source.fileno(), sink.fileno(), random.Random(0)), sender, receiver


def _received(receiver: socket.socket) -> int:
    count = 0
    while True:
        try:
            receiver.recv(65536)
        except BlockingIOError:
            return count
        count += 1


def test_packets_arrive_after_the_delay(link: Link) -> None:
    direction, sender, receiver = link
    sender.send(b"first")
    direction.take(Weather(delay=0.04), NOW)
    assert direction.deliver(NOW + 0.039) == pytest.approx(NOW + 0.04)
    assert _received(receiver) == 0
    assert direction.deliver(NOW + 0.041) is None
    assert receiver.recv(100) == b"first"
    assert (direction.passed.packets, direction.passed.bytes) == (1, 5)


def test_a_packet_with_a_shorter_delay_overtakes(link: Link) -> None:
    direction, sender, receiver = link
    sender.send(b"slow")
    direction.take(Weather(delay=0.1), NOW)
    sender.send(b"fast")
    direction.take(Weather(delay=0.01), NOW + 0.01)
    direction.deliver(NOW + 1)
    assert [receiver.recv(10), receiver.recv(10)] == [b"fast", b"slow"]


def test_a_rate_spreads_packets(link: Link) -> None:
    direction, sender, receiver = link
    weather = Weather(rate=RATE)
    burst = BURST // len(PACKET)
    for _ in range(burst + 10):
        sender.send(PACKET)
        direction.take(weather, NOW)
    # After an idle time, a burst leaves at once, and then a packet every 10 ms.
    direction.deliver(NOW + 0.001)
    assert burst <= (at_once := _received(receiver)) <= burst + 1
    direction.deliver(NOW + 0.051)
    assert _received(receiver) == 5
    direction.deliver(NOW + 1)
    assert _received(receiver) == burst + 5 - at_once


def test_a_full_buffer_loses_packets(link: Link) -> None:
    direction, sender, receiver = link
    for _ in range(100):
        sender.send(PACKET)
        direction.take(Weather(rate=RATE, buffer=10 * len(PACKET)), NOW)
    direction.deliver(NOW + 10)
    arrived = _received(receiver)
    assert arrived + direction.passed.overflowed == 100
    assert arrived == pytest.approx((BURST + 10 * len(PACKET)) // len(PACKET), abs=2)


def test_losses_are_those_of_the_seed(link: Link) -> None:
    direction, sender, receiver = link
    arrived = 0
    for _ in range(1000):
        sender.send(b"packet")
        direction.take(Weather(loss=0.1), NOW)
        direction.deliver(NOW)
        arrived += _received(receiver)
    draw = random.Random(0)
    assert direction.passed.lost == sum(draw.random() < 0.1 for _ in range(1000))
    assert arrived == direction.passed.packets == 1000 - direction.passed.lost


def test_a_connection_between_namespaces() -> None:
    try:
        made = Network()
    except SystemExit:
        pytest.skip("this machine makes no namespaces with TUN devices")
    with made as network, contextlib.ExitStack() as stack:
        network.set(delay=0.05)
        with network.inside("far"):
            server = stack.enter_context(socket.create_server((network.address("far"), 0)))
        with network.inside("near"):
            began = time.monotonic()
            client = stack.enter_context(socket.create_connection(server.getsockname()))
        accepted, (peer, _) = server.accept()
        assert time.monotonic() - began >= 0.1
        assert peer == network.address("near")
        client.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.close()
        assert network.passed()["up"]["bytes"] > len(b"question")
        # What makes the connection, and what ends it.
        wait_until(lambda: network.passed()["down"]["packets"] >= 2)
    # The forwarder has ended, and the namespaces with it.
    with pytest.raises(FileNotFoundError), network.inside("far"):
        pass
