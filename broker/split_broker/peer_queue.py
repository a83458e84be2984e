"""What the broker knows of its peers: which are connected, and what is queued for each.

All of it is soft state: in a broker that has just started, the peers' next announcements rebuild it. Only the
broker's loop uses it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import zmq

from split_common.protocol.headers import Service
from split_common.transport.base import QUEUE_BYTES

#: Bytes that may be on the way to a peer without being confirmed by it.
WINDOW = 64 * 1024 * 1024

#: Messages that may wait for one peer.
QUEUE_MESSAGES = 4096

#: A message's second frame: a ZeroMQ frame as it was received, which is not copied, or bytes of the broker's own.
BodyBytes = zmq.Frame | bytes

RoutedMessage = tuple[bytes, BodyBytes]


@dataclass
class PeerQueue:
    """Messages for one peer, under a byte credit: the peer's announcements say how much it has received."""

    waiting: deque[RoutedMessage] = field(default_factory=deque)
    waiting_bytes: int = 0
    #: Bytes sent over this connection, and how many of them the peer has confirmed.
    sent: int = 0
    received: int = 0
    #: Bytes that the peer had received before this connection; None until its first announcement over it.
    baseline: int | None = None

    def put(self, message: RoutedMessage) -> bool:
        """Queues a message. False if the queue is full."""
        if self.waiting_bytes + len(message[1]) > QUEUE_BYTES or len(self.waiting) >= QUEUE_MESSAGES:
            return False
        self.waiting.append(message)
        self.waiting_bytes += len(message[1])
        return True

    def take(self) -> RoutedMessage | None:
        """Removes and returns the next message. None if there is none, or the peer's credit is used up."""
        if not self.waiting or self.sent - self.received > WINDOW:
            return None
        message = self.waiting.popleft()
        self.waiting_bytes -= len(message[1])
        self.sent += len(message[1])
        return message

    def put_back(self, message: RoutedMessage) -> None:
        """Undoes `take`: the socket did not accept the message."""
        self.waiting.appendleft(message)
        self.waiting_bytes += len(message[1])
        self.sent -= len(message[1])

    def credit(self, received: int) -> None:
        """Notes how many bytes the peer has received since it started. More than was sent is not believed."""
        if self.baseline is None:
            self.baseline = received
        self.received = min(received - self.baseline, self.sent)

    def reconnected(self) -> None:
        """Begins a new connection: what was on its way over the old one is lost."""
        self.sent = self.received = 0
        self.baseline = None


@dataclass
class Peer:
    """A device or worker that announced itself."""

    id: bytes
    #: The connection, as the ROUTER socket names it.
    route: bytes
    role: str
    #: Name of the member that it is authenticated as.
    member: str
    queue: PeerQueue = field(default_factory=PeerQueue)
    #: Time of its last announcement, by `time.monotonic`.
    seen: float = field(default_factory=time.monotonic)
    #: Peers, by id, of whose death it is told.
    watching: frozenset[bytes] = frozenset()
    #: A worker's service, the name of its model, and the further sessions that it can hold.
    service: Service | None = None
    model: str = ""
    room: int = 0
    #: Whether its last announcement showed a certificate.
    certified: bool = False
