"""What devices and workers need from a queue: the interface of a transport, and its limits.

A transport moves messages (`split_common.protocol.headers`) between the peers of a fleet and says when peers die.
It may lose, repeat, delay and reorder messages, and does not read them: sessions number, acknowledge and repeat
what they send, and seal it. docs/architecture/transport.md has the steps for adding one.

What a transport promises:

1. *Delivery is best effort; a refusal is reported.* A message that the transport knows it cannot deliver comes back
   to its sender as a `headers.Bounce`: `gone` if the peer is not connected, `full` if too much waits for it. Any
   other message may be lost without notice.
2. *Nothing grows without bound.* At most `OUTBOX_BYTES` wait at a sender, and about `QUEUE_BYTES` for a receiver.
3. *A device's `headers.Open` goes to one worker of its service that has room* and that the device does not avoid,
   or is refused with `no-worker` or `busy`. `split_common.transport.placement` decides.
4. *Death is noticed.* Every peer announces itself each `HEARTBEAT`. After `MISSED` of them without one, those that
   watch it are told by `Handler.on_gone`. A peer that wrongly counted as dead and comes back is itself told that
   the peers it watches are gone: both sides have then dropped each other's sessions.
5. *A restarted queue says so* by `Handler.on_reset`, and reports no death for the first `GRACE` seconds.
6. *Rosters travel.* A newer roster reaches every peer, and is checked against the operator's key before it is
   used.
7. *Damaged or hostile bytes do no harm.* What breaks the protocol is counted and dropped. No error but
   `queue.Empty` reaches a caller of `receive`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    # `--help` imports this module, which must load nothing else.
    from split_common.protocol.headers import Announce, AnyHeader, Header

_T = TypeVar("_T")

#: Seconds between two announcements of a peer. After `MISSED` of them without one it counts as dead.
HEARTBEAT = 1.0
MISSED = 3

#: Seconds after a restart of the queue during which peers that are alive may not have announced themselves yet.
GRACE = HEARTBEAT * MISSED

#: Seconds that a device waits for a worker with room before it is told to try again.
OPEN_PATIENCE = 2.0

#: Bytes that may wait for one peer. Above that, senders are told that its queue is full.
QUEUE_BYTES = 256 * 1024 * 1024

#: Bytes that may wait at one sender. More are dropped: a queue that takes nothing must not fill the memory.
OUTBOX_BYTES = 256 * 1024 * 1024

#: Seconds after which a sender may repeat a message that was refused because a queue was full.
FULL_RETRY = 0.5


class Handler(Protocol):
    """What a peer does with what arrives.

    A transport calls it on its own threads, or on a thread that waits in `Transport.receive`, one call at a time.
    Handlers must not block. Their errors are counted and logged: a `SplitError` as a dropped message, by its type,
    anything else as `HandlerError`.
    """

    def on_message(self, header: AnyHeader, body: bytes) -> None:
        """A message for this peer, at most `headers.MAX_BODY` bytes. The queue does not authenticate its sender."""

    def on_gone(self, peers: Iterable[bytes]) -> None:
        """Watched peers, by id, that died or left."""

    def on_reset(self) -> None:
        """The queue was restarted, or the connection was lost for a while: what was in flight may be lost."""

    def on_roster(self) -> None:
        """The fleet has a newer roster."""

    def announcement(self) -> Announce:
        """This peer's heartbeat: its identity, the peers that it watches, and a worker's room.

        The transport fills in `received`. An announcement with `leaving` takes the peer out of the queue until the
        next one without it.
        """


class Transport(Protocol):
    """One peer's connection to the queue. Any thread may call its methods."""

    def start(self, handler: Handler, timeout: float) -> None:
        """Connects, and returns when the queue has answered. Called once.

        Args:
            handler: is called from now on until `close` returns.
            timeout: seconds to wait for the queue's first answer.

        Raises:
            BrokerUnreachable: it did not answer in time, or refuses this peer. The transport is closed.
            KeysError, ConfigError: the fleet's keys or the address cannot be used.
        """

    def send(self, header: Header, body: bytes = b"") -> None:
        """Takes a message and never blocks. The garbage collector may call it within any other call.

        Messages from one thread to one peer are delivered in the order in which they were sent, as long as the
        connection lasts. A large `body` is sent without being copied.

        Raises:
            Oversized: the body is larger than `headers.MAX_BODY`.
        """

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        """The next item that the handler puts into `events`.

        The handler may run on the calling thread while it waits, for this caller's messages and for others'.

        Raises:
            queue.Empty: nothing came within `timeout` seconds.
        """

    def announce(self) -> None:
        """Sends a heartbeat at once, because something in the announcement has changed. Does not block."""

    @property
    def alive(self) -> bool:
        """Whether the queue has answered within the last `MISSED` heartbeats, or bytes still move."""

    @property
    def sending(self) -> bool:
        """Whether what was sent is still on its way over a slow network, as far as is known.

        What has no answer yet need not be sent again then.
        """

    def close(self) -> None:
        """Announces that this peer leaves, sends what is queued if that takes no longer than about a second, and
        ends all threads. A handler may call it; calls after the first do nothing.
        """
