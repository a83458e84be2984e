"""The ZeroMQ link through the fault proxy: whatever becomes of its connection, it has another one soon."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from fleet import running_broker
from split_common import wire
from split_common.fleet import load_fleet
from split_common.transport import new_peer_id
from split_common.transport.zmq_link import SILENCE, ZmqLink
from split_device.stress.proxy import Proxy
from wiretap import LATE, wait_until


class Peer:
    """A device that only announces itself."""

    def __init__(self) -> None:
        self._id = new_peer_id("device-1")

    def announcement(self) -> wire.Announce:
        return wire.Announce(self._id, "device", "device-1")

    def on_message(self, header: wire.AnyHeader, body: bytes) -> None: ...
    def on_gone(self, peers: Iterable[bytes]) -> None: ...
    def on_reset(self) -> None: ...
    def on_roster(self) -> None: ...


@pytest.fixture
def linked() -> Iterator[tuple[Proxy, ZmqLink]]:
    with running_broker() as broker:
        proxy = Proxy("127.0.0.1", int(broker.address.rpartition(":")[2]))
        fleet = load_fleet()
        link = ZmqLink(f"tcp://127.0.0.1:{proxy.port}", fleet, fleet.identity("device"))
        try:
            link.start(Peer(), 10)
            yield proxy, link
        finally:
            link.close()
            proxy.close()


def flip_what_comes_from_the_broker(proxy: Proxy) -> None:
    """Damages the next chunk on its way to the peer; CURVE makes that an error of the protocol."""
    [connection] = proxy._connections
    pump = connection.near.write

    def damaged(data: bytes) -> None:
        connection.near.write = pump  # type: ignore[method-assign]
        pump(data[:-1] + bytes([data[-1] ^ 1]))

    connection.near.write = damaged  # type: ignore[method-assign]


def hears_again(link: ZmqLink, fault: Callable[[], Any]) -> None:
    """After a fault, the broker's word arrives over another connection."""
    fault()
    time.sleep(1.5)  # meanwhile the fault strikes a heartbeat or its answer
    before = link.counters["messages_received"]
    wait_until(lambda: link.counters["messages_received"] > before and link.alive, SILENCE + LATE)


def test_damaged_bytes_from_the_broker(linked: tuple[Proxy, ZmqLink]) -> None:
    """libzmq never connects again after an error of the protocol: the link has to."""
    proxy, link = linked
    hears_again(link, lambda: flip_what_comes_from_the_broker(proxy))


@pytest.mark.parametrize("fault", ["reset", "truncate", "corrupt", "blackhole"])
def test_the_proxys_faults(fault: str, linked: tuple[Proxy, ZmqLink]) -> None:
    proxy, link = linked
    arguments = [1.0] if fault == "blackhole" else []
    hears_again(link, lambda: getattr(proxy, fault)(random.Random(1), *arguments))
