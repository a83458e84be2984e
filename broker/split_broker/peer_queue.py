"""What the broker knows of its peers: which are connected, and what is queued for each.

All of it is soft state: in a broker that has just started, the peers' next announcements rebuild it. Only the
broker's loop uses it.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from split_broker.under_way import UnderWay
from split_common.protocol.headers import Relay, Service, session_label
from split_common.transport.base import QUEUE_BYTES
from split_common.transport.peer_id import peer_name
from split_common.trust.shares import Usage

#: Messages that may wait for one peer.
QUEUE_MESSAGES = 4096

#: A message's second frame: a ZeroMQ frame as it was received, which is not copied, or bytes of the broker's own.
BodyBytes = zmq.Frame | bytes

RoutedMessage = tuple[bytes, BodyBytes]


class Queued(NamedTuple):
    """A message that waits, or waited, for a peer."""

    #: Name of the member that sent it; empty if it is the broker's own.
    sender: str
    message: RoutedMessage

    @property
    def size(self) -> int:
        """Bytes of its header and body."""
        return len(self.message[0]) + len(self.message[1])


class PeerQueue:
    """Messages for one peer, under a byte credit: the peer's announcements say how much it has received.

    Senders take turns, so that one that floods the queue delays its own messages. If the queue is full, the sender
    with the most in it loses its newest message to one with less (longest queue drop: Suter et al., "Design
    Considerations for Supporting TCP with Per-flow Queueing", INFOCOM 1998), which shares the queue max-min.

    Args:
        member: the peer's member, under whose name `usage` counts.
        usage: counts the bytes that wait or are under way, by member.
        gave_way: is told of each message that loses its place.
    """

    def __init__(
        self, member: str = "", usage: Usage | None = None, gave_way: Callable[[Queued], object] = lambda _: None
    ) -> None:
        self._member = member
        self._usage = Usage() if usage is None else usage
        self._gave_way = gave_way
        self._counted = 0
        # By sender, in the order of their turns.
        self._waiting: OrderedDict[str, deque[Queued]] = OrderedDict()
        self._bytes, self._messages = Usage(), Usage()
        self.under_way = UnderWay()

    def __len__(self) -> int:
        """The messages that wait."""
        return self._messages.total

    @property
    def waiting_bytes(self) -> int:
        return self._bytes.total

    @property
    def held(self) -> int:
        """Bytes that wait, or are under way and not confirmed."""
        return self._bytes.total + self.under_way.bytes

    def put(self, message: RoutedMessage, sender: str = "") -> bool:
        """Queues a message. False if the queue is full, and none of its senders has more in it than this one."""
        queued = Queued(sender, message)
        if not self._has_room(queued.size):
            if self._part(sender, queued) > max(map(self._part, self._waiting), default=0.0):
                return False
            while not self._has_room(queued.size):
                self._drop(max((name for name in self._waiting if name != sender), key=self._part))
        self._waiting.setdefault(sender, deque()).append(queued)
        self._add(queued, 1)
        return True

    def skip(self, size: int, sender: str = "") -> bool:
        """Counts a body of `size` bytes that is sent without waiting; False if it has to wait for something."""
        if self._waiting or not self.under_way.allows(sender):
            return False
        self.under_way.add(sender, size)
        # As `_count`, in less time: most messages take this way.
        self._counted += size
        self._usage.add(self._member, size)
        return True

    def unskip(self, size: int, sender: str = "") -> None:
        """Undoes `skip`: the socket did not accept the message."""
        self.under_way.undo(sender, size)
        self._count()

    def take(self) -> Queued | None:
        """Removes and returns the next message. None if no sender with one may send it yet."""
        sender = next(filter(self.under_way.allows, self._waiting), None)
        if sender is None:
            return None
        messages = self._waiting[sender]
        queued = messages.popleft()
        if messages:
            self._waiting.move_to_end(sender)
        else:
            del self._waiting[sender]
        self.under_way.add(sender, len(queued.message[1]))
        self._add(queued, -1)
        return queued

    def put_back(self, queued: Queued) -> None:
        """Undoes `take`: the socket did not accept the message."""
        self._waiting.setdefault(queued.sender, deque()).appendleft(queued)
        self._waiting.move_to_end(queued.sender, last=False)
        self.under_way.undo(queued.sender, len(queued.message[1]))
        self._add(queued, 1)

    def drop_newest(self) -> bool:
        """Drops the newest message of the sender with the most. False if none waits."""
        if not self._waiting:
            return False
        self._drop(max(self._waiting, key=self._part))
        return True

    def credit(self, received: int, unsent: int = 0) -> None:
        """Notes how many bytes the peer has received since it started.

        Args:
            received: what the peer says. More than was sent is not believed.
            unsent: bytes that have not left this machine, as the kernel counts them. They are not believed either.
        """
        self.under_way.confirm(received, unsent)
        self._count()

    def reconnected(self) -> None:
        """Begins a new connection: what was on its way over the old one is lost."""
        self.under_way.lose()
        self._count()

    def clear(self) -> None:
        """Forgets everything: the peer is gone."""
        self._waiting.clear()
        self._bytes, self._messages = Usage(), Usage()
        self.reconnected()

    def _has_room(self, size: int) -> bool:
        return self._bytes.total + size <= QUEUE_BYTES and len(self) < QUEUE_MESSAGES

    def _part(self, sender: str, more: Queued | None = None) -> float:
        """A sender's part of the queue, with one message more: of its bytes or of its messages, the larger."""
        size, count = (more.size, 1) if more is not None else (0, 0)
        return max((self._bytes[sender] + size) / QUEUE_BYTES, (self._messages[sender] + count) / QUEUE_MESSAGES)

    def _drop(self, sender: str) -> None:
        messages = self._waiting[sender]
        queued = messages.pop()
        if not messages:
            del self._waiting[sender]
        self._add(queued, -1)
        self._gave_way(queued)

    def _add(self, queued: Queued, sign: int) -> None:
        self._bytes.add(queued.sender, sign * queued.size)
        self._messages.add(queued.sender, sign)
        self._count()

    def _count(self) -> None:
        """Tells `usage` what has changed."""
        if (change := self.held - self._counted) != 0:
            self._counted += change
            self._usage.add(self._member, change)


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
    #: When one of its announcements last gave it opens, by `time.monotonic`.
    placed: float = float("-inf")
    #: Whether its last announcement showed a certificate.
    certified: bool = False

    @property
    def name(self) -> str:
        """Its name in the log, which tells it from the member's other processes."""
        return peer_name(self.member, self.id)


def described(sender: Peer, target: Peer, header: Relay, body: BodyBytes) -> str:
    """What the broker can see of a message, for the log."""
    start = memoryview(body)[:16]  # type: ignore[arg-type]
    return (
        f"{header.kind.name} {sender.name} -> {target.name}: channel {header.channel}, "
        f"session {session_label(header.session)}, seq {header.seq}, {len(body)} bytes {start.hex()}…"
    )
