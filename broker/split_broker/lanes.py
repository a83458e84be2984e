"""What the broker knows of its peers: who is connected, what is queued for whom, and how much of it is unread.

All of it is soft state. A peer's next announcement rebuilds it in a broker that has just started.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import zmq

from split_common.headers import Open, Service

#: Bytes that may be on the way to a peer without its having said that it received them.
WINDOW = 64 * 1024 * 1024

#: Bytes that may wait in a lane; above, senders are told that it is full.
LANE_BYTES = 256 * 1024 * 1024

#: Messages that may wait in a lane.
LANE_MESSAGES = 4096

#: A message's second frame: as it was received, so that a large one is not copied, or one of the broker's own.
Body = zmq.Frame | bytes

Message = tuple[bytes, Body]


@dataclass
class Lane:
    """The queue of one peer, under a byte credit: the peer's announcements say what it has received."""

    waiting: deque[Message] = field(default_factory=deque)
    waiting_bytes: int = 0
    sent: int = 0
    received: int = 0
    #: What the peer had received before this connection.
    baseline: int | None = None

    def put(self, message: Message) -> bool:
        """Queues a message; False when the lane is full."""
        if self.waiting_bytes + len(message[1]) > LANE_BYTES or len(self.waiting) >= LANE_MESSAGES:
            return False
        self.waiting.append(message)
        self.waiting_bytes += len(message[1])
        return True

    def take(self) -> Message | None:
        """The next message that the peer's credit allows."""
        if not self.waiting or self.sent - self.received > WINDOW:
            return None
        message = self.waiting.popleft()
        self.waiting_bytes -= len(message[1])
        self.sent += len(message[1])
        return message

    def put_back(self, message: Message) -> None:
        self.waiting.appendleft(message)
        self.waiting_bytes += len(message[1])
        self.sent -= len(message[1])

    def credit(self, received: int) -> None:
        """The peer says that it has received so many bytes since it started."""
        if self.baseline is None:
            self.baseline = received
        self.received = min(received - self.baseline, self.sent)

    def reconnected(self) -> None:
        """What was on the way over the old connection is lost, and its credit with it."""
        self.sent = self.received = 0
        self.baseline = None


@dataclass
class Peer:
    """A device or worker that announced itself."""

    id: bytes
    route: bytes
    role: str
    member: str
    lane: Lane = field(default_factory=Lane)
    seen: float = field(default_factory=time.monotonic)
    watching: frozenset[bytes] = frozenset()
    service: Service | None = None
    model: str = ""
    room: int = 0


@dataclass
class Waiting:
    """A device's wish for a worker, while none has room."""

    header: Open
    message: Message
    deadline: float
