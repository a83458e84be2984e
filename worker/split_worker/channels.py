"""The worker's channels to devices."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from split_common.protocol import headers
from split_common.protocol.channel import CHANNEL_LIFETIME, CHANNEL_SESSIONS, Channel, EpochKeys
from split_common.trust.keys import Roster
from split_common.trust.limited_log import LimitedLog
from split_common.trust.shares import Usage
from split_worker.set_ups import ChannelId, SetUps

log = logging.getLogger(__name__)

#: Most channels of one device; beyond this its least recently used one is closed.
MAX_CHANNELS_PER_DEVICE = 8

#: Most channels of all devices, which is as many peers as a worker may watch; beyond this the member with most
#: channels loses its least recently used one.
MAX_CHANNELS = headers.MAX_WATCHED

#: Most sessions of one channel whose epochs are remembered: twice as many as a device opens over it.
MAX_EPOCHS = 2 * CHANNEL_SESSIONS

#: Most sessions of one member whose epochs are remembered; beyond this its least recently used channels are closed.
#: Each takes about 100 bytes.
MAX_MEMBER_EPOCHS = 8 * MAX_EPOCHS


@dataclass
class OpenChannel:
    """A channel in use: the keys of its control messages, and the highest epoch so far of each of its sessions."""

    channel: Channel
    control: EpochKeys
    #: Written by `ChannelTable.remember` alone.
    epochs: dict[headers.SessionRef, int] = field(default_factory=dict)
    #: When a request last came, by the monotonic clock.
    used: float = field(default_factory=time.monotonic)

    @property
    def member(self) -> str:
        """The name in the device's certificate, by which its shares are counted."""
        return self.channel.peer.name


class ChannelTable:
    """All channels of a worker. Used under the worker's lock.

    Args:
        set_ups: channels that are being set up.
        on_close: called with the id of each channel that was in use and is closed.
    """

    def __init__(self, set_ups: SetUps, on_close: Callable[[ChannelId], None]) -> None:
        self.set_ups = set_ups
        self._on_close = on_close
        #: Channels in use, the least recently used first.
        self.open: OrderedDict[ChannelId, OpenChannel] = OrderedDict()
        self._log = LimitedLog(log)
        # Channels and remembered epochs of each member.
        self._channels = Usage()
        self._epochs = Usage()

    def finish(self, id_: ChannelId, message: bytes) -> None:
        """Completes the set-up of a channel. Raises what `SetUps.finish` does; no other channel then changes."""
        channel = self.set_ups.finish(id_, message)
        if id_ in self.open:
            self.close(id_)
        self._make_room(id_[0], channel.peer.name)
        self.open[id_] = OpenChannel(channel, channel.epoch_keys(0, 0))
        self._channels.add(channel.peer.name, 1)

    def _make_room(self, device: bytes, member: str) -> None:
        """Closes a channel if another one of a device would be too many."""
        own = [id_ for id_ in self.open if id_[0] == device]
        if len(own) >= MAX_CHANNELS_PER_DEVICE:
            self.close(own[0])
        elif len(self.open) >= MAX_CHANNELS:
            self._channels.add(member, 1)
            largest = self._channels.largest()
            self._channels.add(member, -1)
            self.close(next(id_ for id_, open_ in self.open.items() if open_.member == largest))

    def touch(self, id_: ChannelId) -> None:
        """Notes that an authentic request has come over a channel."""
        self.open[id_].used = time.monotonic()
        self.open.move_to_end(id_)

    def remember(self, id_: ChannelId, session: headers.SessionRef, epoch: int) -> bool:
        """Notes that a session of this epoch, or of an earlier one, is never opened again.

        Returns:
            False if the channel remembers as many sessions as it may; it then opens no new ones.
        """
        open_ = self.open[id_]
        if session not in open_.epochs:
            if len(open_.epochs) >= MAX_EPOCHS:
                return False
            self._epochs.add(open_.member, 1)
        open_.epochs[session] = epoch
        return True

    def close(self, id_: ChannelId) -> None:
        closed = self.open.pop(id_)
        self._channels.add(closed.member, -1)
        if closed.epochs:
            self._epochs.add(closed.member, -len(closed.epochs))
        self._on_close(id_)

    def close_gone(self, peers: Iterable[bytes]) -> None:
        """Closes the channels of devices that have left."""
        gone = set(peers)
        self.set_ups.drop_gone(gone)
        for id_ in [id_ for id_ in self.open if id_[0] in gone]:
            self.close(id_)

    def close_stale(self, roster: Roster) -> None:
        """Closes channels that are unused, that remember too much, or whose device is not trusted any more."""
        self.set_ups.drop_stale()
        now = time.monotonic()
        for id_, open_ in list(self.open.items()):
            trusted = open_.channel.trusted(roster)
            if not trusted:
                name = open_.member
                self._log.warning(name, "device %s is revoked, or its certificate has expired", name)
            if not trusted or now - open_.used > 2 * CHANNEL_LIFETIME:
                self.close(id_)
        while (largest := self._epochs.largest()) and self._epochs[largest] > MAX_MEMBER_EPOCHS:
            self.close(next(id_ for id_, open_ in self.open.items() if open_.epochs and open_.member == largest))
