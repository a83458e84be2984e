"""What one member may ask of the broker, however many connections and peers it has.

Rates bind always, because a message that is dropped costs its sender only a retry. Shares of memory bind while
there is too little of it: then the member that holds the most gives way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from split_broker.peer_queue import Peer
from split_common.trust.shares import TokenBuckets, Usage


@dataclass(frozen=True, eq=False)
class Rate:
    """Messages of a kind that one member's peers may send: a second on average, and at once.

    Kinds with the same numbers are different kinds: each has buckets of its own.
    """

    rate: float
    burst: float


#: Heartbeats: one a second of each peer, one for every 4 MiB received, one for each change of a worker's room.
ANNOUNCEMENTS = Rate(1000, 4000)
#: Watched peers that are not there and together count as one more heartbeat: an honest peer forgets them once told.
STRANGERS_WATCHED = 16
#: Bytes of headers that are longer than `LONG_HEADER`: heartbeats of peers that watch hundreds of others. They are
#: counted before they are decoded, which takes longer than all else.
LONG_HEADERS = Rate(2 * 1024**2, 4 * 1024**2)
LONG_HEADER = 4096
#: Requests for a worker. A device repeats one every few seconds.
OPENS = Rate(100, 1000)
#: Answers that a request for a worker comes too often. What is asked beyond that is dropped: an answer costs the
#: broker as much as a message of somebody else, and a device asks again by itself.
TOO_OFTENS = Rate(100, 100)
#: Messages of peers that are not announced, which are told so. Their heartbeats announce them soon in any case.
UNANNOUNCED = Rate(100, 1000)
#: Requests for the roster. A new roster makes all peers ask for it at once; what is dropped is asked for again.
ROSTER_REQUESTS = Rate(50, 1000)


class Rates:
    """A token bucket for each member and kind of message."""

    def __init__(self) -> None:
        self._buckets: dict[Rate, TokenBuckets] = {}

    def admits(self, member: str, rate: Rate, weight: float = 1.0) -> bool:
        """Whether a member may send one more message of a kind; counts it, as `weight` messages, if so."""
        buckets = self._buckets.get(rate)
        if buckets is None:
            buckets = self._buckets[rate] = TokenBuckets(rate.rate, rate.burst)
        return buckets.take(member, weight)


class Budget:
    """The bytes that wait for all peers, or are under way to them, shared max-min by the peers' members.

    Args:
        capacity: the most of all, in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.usage = Usage()
        self._capacity = capacity

    def make_room(self, member: str, size: int, peers: Collection[Peer], end: Callable[[Peer], object]) -> bool:
        """Makes room for `size` bytes for a member's peer. False if no member holds more than this one.

        Args:
            peers: all peers.
            end: ends the connection of a peer to which everything that it holds is under way.
        """
        while self.usage.total + size > self._capacity:
            largest = self.usage.largest()
            if largest is None or self.usage[member] + size > self.usage[largest]:
                return False
            fullest = max((peer for peer in peers if peer.member == largest), key=lambda peer: peer.queue.held)
            if not fullest.queue.drop_newest():
                end(fullest)
        return True
