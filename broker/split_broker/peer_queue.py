"""What the broker knows of its peers: who is connected, what is queued for whom, and how much of it is unread.

All of it is soft state. A peer's next announcement rebuilds it in a broker that has just started.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import zmq

from split_common.protocol.headers import Service
from split_common.transport.base import QUEUE_BYTES

#: Bytes that may be on the way to a peer that has not said yet that it received them.
WINDOW = 64 * 1024 * 1024

#: Messages that may wait for one peer.
QUEUE_MESSAGES = 4096

#: A message's second frame: as it was received, so that a large one is not copied, or one of the broker's own.
BodyBytes = zmq.Frame | bytes

RoutedMessage = tuple[bytes, BodyBytes]


@dataclass
class PeerQueue:
    """Messages for one peer, under a byte credit: the peer's announcements say how much it has received."""

    waiting: deque[RoutedMessage] = field(default_factory=deque)
    waiting_bytes: int = 0
    #: Bytes sent over this connection, and those of them that the peer says it has received.
    sent: int = 0
    received: int = 0
    #: Bytes that the peer had received before this connection; None until it has said so.
    baseline: int | None = None

    def put(self, message: RoutedMessage) -> bool:
        """Queues a message. False if the queue is full."""
        if self.waiting_bytes + len(message[1]) > QUEUE_BYTES or len(self.waiting) >= QUEUE_MESSAGES:
            return False
        self.waiting.append(message)
        self.waiting_bytes += len(message[1])
        return True

    def take(self) -> RoutedMessage | None:
        """The next message that the peer's credit allows."""
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
        """The peer says how many bytes it has received since it started. More than was sent is not believed."""
        if self.baseline is None:
            self.baseline = received
        self.received = min(received - self.baseline, self.sent)

    def reconnected(self) -> None:
        """What was on its way over the old connection is lost, and its credit with it."""
        self.sent = self.received = 0
        self.baseline = None


@dataclass
class Peer:
    """A device or worker that announced itself."""

    id: bytes
    #: The connection, as the ROUTER socket names it.
    route: bytes
    role: str
    #: The member as which it is authenticated.
    member: str
    queue: PeerQueue = field(default_factory=PeerQueue)
    #: When it was last heard, by `time.monotonic`.
    seen: float = field(default_factory=time.monotonic)
    #: Peers whose death it wants to hear of.
    watching: frozenset[bytes] = frozenset()
    #: What a worker serves and calls it, and the sessions that it has room for.
    service: Service | None = None
    model: str = ""
    room: int = 0
