"""What devices and workers need of a queue, whatever carries it.

A transport moves messages (`split_common.headers`) between peers and says when peers die. It may lose, repeat or
delay messages: sessions are built so that at-least-once delivery is enough.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from split_common.address import is_redis, parse_address
from split_common.errors import ConfigError, SplitError
from split_common.fleet import Fleet, check_address
from split_common.headers import Announce, AnyHeader, Header
from split_common.keys import Identity

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Where the broker listens, and where peers look for it, when no address is given.
DEFAULT_BROKER = "tcp://127.0.0.1:7411"

#: Seconds between two announcements of a peer; after `MISSED` of them without one it is held for dead.
HEARTBEAT = 1.0
MISSED = 3

#: Seconds after a restart of the queue during which it is not known yet who is alive.
GRACE = HEARTBEAT * MISSED

#: Seconds that a device's wish for a worker waits for room before the device is told to try again.
OPEN_PATIENCE = 2.0


class Handler(Protocol):
    """What a peer does with what arrives. Called on the transport's threads or within `receive`: must not block."""

    def on_message(self, header: AnyHeader, body: bytes) -> None:
        """A message for this peer; an exception of type SplitError is counted and logged, and nothing else."""

    def on_gone(self, peers: Iterable[bytes]) -> None:
        """Watched peers that died or left."""

    def on_reset(self) -> None:
        """The queue was restarted: what was in flight may be lost."""

    def on_roster(self) -> None:
        """The fleet has a newer roster."""

    def announcement(self) -> Announce:
        """This peer's heartbeat; the transport fills in what it has received.

        One that says `leaving` takes the peer out of the queue until one does not.
        """


class Transport(Protocol):
    """One peer's connection to the queue. Methods may be called from any thread."""

    def start(self, handler: Handler, timeout: float) -> None:
        """Connects, and returns when the queue has answered.

        Raises:
            BrokerUnreachable: it has not within `timeout` seconds.
        """

    def send(self, header: Header, body: bytes = b"") -> None:
        """Takes a message; never blocks, and is safe even where the garbage collector may call it."""

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        """The next of what the handler puts into `events`; while the caller waits, it may be called in his thread.

        Raises:
            queue.Empty: nothing came within `timeout` seconds.
        """

    def announce(self) -> None:
        """Sends a heartbeat now, because something in it has changed."""

    @property
    def alive(self) -> bool:
        """Whether the queue has answered lately."""

    def close(self) -> None: ...


def connect(address: str, fleet: Fleet, identity: Identity) -> Transport:
    """The transport for an address, not started yet.

    Raises:
        ConfigError: the address is malformed, or not this machine's though no keys are configured.
    """
    address = parse_address(address)
    if address.endswith(":*"):
        raise ConfigError(f"broker address {address!r} lacks the port that the broker has taken")
    check_address(address, fleet)
    if is_redis(address):
        from split_common.transport.redis.link import RedisLink

        return RedisLink(address, fleet, identity)
    from split_common.transport.zmq_link import ZmqLink

    return ZmqLink(address, fleet, identity)


def count_dropped(counters: Counter[str], error: SplitError) -> None:
    """Counts a message that was refused, by type of error. Logs the 1st, 2nd, 4th…: a flood must not fill disks."""
    name = type(error).__name__
    counters[name] += 1
    if counters[name].bit_count() == 1:
        log.warning("dropped a message (%s, %d so far): %s", name, counters[name], error)


def member_mark(member: str) -> bytes:
    """How the ids of all peers of a member begin: rules of access can tell by it whose a peer is."""
    return hashlib.blake2b(member.encode(), digest_size=4).digest()


def new_peer_id(member: str) -> bytes:
    """Identifies one run of a device or worker."""
    return member_mark(member) + os.urandom(4)
