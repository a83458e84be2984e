"""Channels that are being set up: shares of members that have not proved yet who they are."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from split_common.errors import AuthenticationError, Busy
from split_common.protocol.channel import Channel
from split_common.protocol.handshake import WorkerHandshake
from split_common.transport import mark_of, member_mark
from split_common.trust.keys import Roster
from split_common.trust.shares import TokenBucket, TokenBuckets, Usage

#: Most channels that are being set up; beyond this the member with most of them loses its oldest.
MAX_HALF_OPEN = 256

#: Seconds that a device has to complete the set-up of a channel.
HALF_OPEN_TIMEOUT = 60.0

#: Opens that are answered: each second on average, and at once, because all devices come together when a worker has
#: started. One takes about half a millisecond, with its answer. If there are more, each member still has a rate of
#: its own.
SET_UP_RATE = 64.0
MEMBER_SET_UP_RATE = 32.0
SET_UP_BURST = 256.0

#: The peer id of a channel's device, and the channel's number.
ChannelId = tuple[bytes, int]


@dataclass
class HalfOpen:
    """A channel that is being set up: the device's first message, and the handshake that answers it."""

    hello: bytes
    handshake: WorkerHandshake
    #: When it began, by the monotonic clock.
    since: float = field(default_factory=time.monotonic)


class SetUps:
    """Channels that are being set up. Used under the worker's lock.

    Who has sent an `Open` is proved only by the last message of the set-up. Until then it counts for the member
    whose mark begins the sender's id. A member that uses another's gets no channel, but can slow its set-ups down.

    Args:
        new_handshake: answers a device's first message.
        roster: returns the fleet's roster.
    """

    def __init__(self, new_handshake: Callable[[bytes], WorkerHandshake], roster: Callable[[], Roster]) -> None:
        self._new_handshake = new_handshake
        self._roster = roster
        #: The oldest first.
        self.half_open: OrderedDict[ChannelId, HalfOpen] = OrderedDict()
        # How many of them each member has, and how many more it may begin now, by its mark as hex digits.
        self._begun = Usage()
        self._rates = TokenBuckets(MEMBER_SET_UP_RATE, SET_UP_BURST)
        self._rate = TokenBucket(SET_UP_RATE, SET_UP_BURST)
        # The marks of the devices in a version of the roster.
        self._marks: tuple[int, frozenset[str]] = (0, frozenset())

    def begin(self, id_: ChannelId, hello: bytes) -> bytes:
        """Begins to set up a channel. Returns the answer, which is the same if a message is repeated.

        Raises:
            Busy: too many come, and the member has had its share of them.
            AuthenticationError, CertificateError, Malformed: the message is refused.
        """
        mark = _mark(id_)
        if mark not in self._known_marks():
            raise AuthenticationError("a channel was asked for under a peer id that no device of the fleet has")
        if not (self._rates.take(mark) or self._rate.take()):
            raise Busy("a member begins to set up too many channels")
        half = self.half_open.get(id_)
        if half is None or half.hello != hello:
            begun = HalfOpen(hello, self._new_handshake(hello))
            if half is not None:
                self.drop(id_)
            half = self.half_open[id_] = begun
            self._begun.add(mark, 1)
            if len(self.half_open) > MAX_HALF_OPEN:
                largest = self._begun.largest()
                self.drop(next(each for each in self.half_open if _mark(each) == largest))
        return half.handshake.answer

    def finish(self, id_: ChannelId, message: bytes) -> Channel:
        """Completes a set-up in `half_open` with the device's last message.

        Raises:
            CertificateError: the device's certificate is refused. The message is authentic, so that no other one
                can complete this set-up.
            AuthenticationError: the message is refused, or the peer id is another member's.
            Malformed: the message is refused.
        """
        channel = self.half_open[id_].handshake.finish(message)
        if member_mark(channel.peer.name) != mark_of(id_[0]):
            raise AuthenticationError(f"device {channel.peer.name} uses a peer id of another member")
        self.drop(id_)
        return channel

    def drop(self, id_: ChannelId) -> None:
        """Forgets a set-up."""
        del self.half_open[id_]
        self._begun.add(_mark(id_), -1)

    def drop_gone(self, peers: set[bytes]) -> None:
        """Forgets the set-ups of devices that have left."""
        for id_ in [id_ for id_ in self.half_open if id_[0] in peers]:
            self.drop(id_)

    def drop_stale(self) -> None:
        """Forgets set-ups that take too long."""
        now = time.monotonic()
        for id_ in [id_ for id_, half in self.half_open.items() if now - half.since > HALF_OPEN_TIMEOUT]:
            self.drop(id_)

    def _known_marks(self) -> frozenset[str]:
        roster = self._roster()
        if roster.version != self._marks[0]:
            names = [member.name for member in roster.members if member.role == "device" and not member.revoked]
            self._marks = roster.version, frozenset(member_mark(name).hex() for name in names)
            self._rates.keep(self._marks[1])
        return self._marks[1]


def _mark(id_: ChannelId) -> str:
    return mark_of(id_[0]).hex()
