"""The worker's channels to devices: those that are being set up, and those in use."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from split_common.protocol import headers
from split_common.protocol.channel import CHANNEL_LIFETIME, Channel, SessionKeys
from split_common.protocol.handshake import WorkerHandshake
from split_common.trust.keys import Roster

log = logging.getLogger(__name__)

#: Most channels that are being set up; beyond this the oldest is dropped.
MAX_HALF_OPEN = 256

#: Seconds that a device has to complete the set-up of a channel.
HALF_OPEN_TIMEOUT = 60.0

#: Most channels of one device; beyond this its least recently used one is closed.
MAX_CHANNELS_PER_DEVICE = 8

#: Most channels of all devices, which is as many peers as a worker may watch; beyond this the least recently used
#: one is closed.
MAX_CHANNELS = headers.MAX_WATCHED

#: The peer id of a channel's device, and the channel's number.
ChannelId = tuple[bytes, int]


@dataclass
class HalfOpen:
    """A channel that is being set up: the device's first message, and the handshake that answers it."""

    hello: bytes
    handshake: WorkerHandshake
    #: When it began, by the monotonic clock.
    since: float = field(default_factory=time.monotonic)


@dataclass
class OpenChannel:
    """A channel in use: the keys of its control messages, and the highest epoch so far of each of its sessions."""

    channel: Channel
    control: SessionKeys
    epochs: dict[int, int] = field(default_factory=dict)
    #: When a request last came, by the monotonic clock.
    used: float = field(default_factory=time.monotonic)


class ChannelTable:
    """All channels of a worker. Used under the worker's lock.

    Args:
        new_handshake: answers a device's first message.
        on_close: called with the id of each channel that was in use and is closed.
    """

    def __init__(
        self, new_handshake: Callable[[bytes], WorkerHandshake], on_close: Callable[[ChannelId], None]
    ) -> None:
        self._new_handshake = new_handshake
        self._on_close = on_close
        #: Channels that are being set up, the oldest first.
        self.half_open: OrderedDict[ChannelId, HalfOpen] = OrderedDict()
        #: Channels in use, the least recently used first.
        self.open: OrderedDict[ChannelId, OpenChannel] = OrderedDict()

    def begin(self, id_: ChannelId, hello: bytes) -> bytes:
        """Begins to set up a channel. Returns the answer, which is the same if a message is repeated.

        Raises:
            AuthenticationError, CertificateError, Malformed: the message is refused.
        """
        half = self.half_open.get(id_)
        if half is None or half.hello != hello:
            half = HalfOpen(hello, self._new_handshake(hello))
            self.half_open[id_] = half
            if len(self.half_open) > MAX_HALF_OPEN:
                self.half_open.popitem(last=False)
        return half.handshake.answer

    def finish(self, id_: ChannelId, message: bytes) -> None:
        """Completes the set-up of a channel in `half_open` with the device's last message.

        Raises:
            CertificateError: the device's certificate is refused. The message is authentic, so that no other one
                can complete this set-up.
            AuthenticationError, Malformed: the message is refused.
        """
        channel = self.half_open[id_].handshake.finish(message)
        del self.half_open[id_]
        if id_ in self.open:
            self.close(id_)
        self._make_room(id_[0])
        self.open[id_] = OpenChannel(channel, channel.session_keys(0, 0))

    def _make_room(self, device: bytes) -> None:
        """Closes a channel if another one of a device would be too many."""
        own = [id_ for id_ in self.open if id_[0] == device]
        if len(own) >= MAX_CHANNELS_PER_DEVICE:
            self.close(own[0])
        elif len(self.open) >= MAX_CHANNELS:
            self.close(next(iter(self.open)))

    def touch(self, id_: ChannelId) -> None:
        """Notes that an authentic request has come over a channel."""
        self.open[id_].used = time.monotonic()
        self.open.move_to_end(id_)

    def close(self, id_: ChannelId) -> None:
        del self.open[id_]
        self._on_close(id_)

    def close_gone(self, peers: Iterable[bytes]) -> None:
        """Closes the channels of devices that have left."""
        gone = set(peers)
        for id_ in [id_ for id_ in self.half_open if id_[0] in gone]:
            del self.half_open[id_]
        for id_ in [id_ for id_ in self.open if id_[0] in gone]:
            self.close(id_)

    def close_stale(self, roster: Roster) -> None:
        """Closes unused channels, and those of devices that are revoked or whose certificate has expired."""
        now = time.monotonic()
        for id_, half in list(self.half_open.items()):
            if now - half.since > HALF_OPEN_TIMEOUT:
                del self.half_open[id_]
        for id_, open_ in list(self.open.items()):
            trusted = open_.channel.trusted(roster)
            if not trusted:
                log.warning("device %s is revoked, or its certificate has expired", open_.channel.peer.name)
            if not trusted or now - open_.used > 2 * CHANNEL_LIFETIME:
                self.close(id_)
