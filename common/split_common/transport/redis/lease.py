"""A peer's own lane, and the lease on it: a peer is alive as long as its lane exists.

A lane expires unless its owner's heartbeats renew it. If a heartbeat finds that the lease has ended, or that the
server has lost its data, messages may have been lost.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from enum import Enum, auto

from redis.exceptions import OutOfMemoryError

from split_common.protocol import headers
from split_common.transport.base import GRACE, HEARTBEAT, MISSED, QUEUE_BYTES
from split_common.transport.redis.answers import OUT_OF_MEMORY, Refused, Unreachable, failed
from split_common.transport.redis.key_names import Keys, entry
from split_common.transport.redis.server import Command, RedisConnections

#: Seconds after which a lane expires unless its owner's heartbeat renews it.
LEASE = HEARTBEAT * MISSED

#: Bytes in a peer's own lane above which it is emptied unread. Honest senders stop soon after `QUEUE_BYTES`.
MAX_LANE = 2 * QUEUE_BYTES

#: Bytes of the server's mark that are compared.
_BOOT_BYTES = 32

log = logging.getLogger(__name__)


class Found(Enum):
    """What has happened since the last heartbeat."""

    #: Nothing of note, or this was the first.
    NOTHING = auto()
    #: Messages that were in flight may be lost.
    RESET = auto()
    #: The lease had ended: the peers that watch this one were told that it is gone, and have dropped its sessions.
    LEASE_ENDED = auto()


class Lease:
    """Keeps one peer's lane. For the housekeeping thread; others may read its attributes and call `replace_lane`.

    Args:
        connections: to the server.
        keys: names of the fleet's keys.
        first: the peer's first announcement, with its id and role.
    """

    def __init__(self, connections: RedisConnections, keys: Keys, first: headers.Announce) -> None:
        self._connections = connections
        self._boot_key = keys.boot
        self._sets_boot = first.role == "worker"
        #: The key of the peer's lane.
        self.lane = keys.lane(first.role, first.sender)
        #: Times that the lane was made. When this changes, its reader begins again.
        self.lanes_made = 0
        #: When the server last answered, by `time.monotonic`.
        self.heard = 0.0
        #: Whether the server did not answer when it was last tried.
        self.disconnected = False
        # Whether the lane has its last possible id, so nothing more can be added.
        self._is_exhausted = False
        # Whether the peer has taken itself out of the queue for a while.
        self._away = False
        self._own_boot = os.urandom(8)
        self._boot: bytes | None = None
        self._early_until = 0.0
        self._next_reset = 0.0

    @property
    def early(self) -> bool:
        """Whether peers that are alive may not have renewed their leases yet, because the server was away."""
        return time.monotonic() < self._early_until

    def replace_lane(self) -> None:
        """Makes the next heartbeat replace the lane, because nothing more can be added to it."""
        self._is_exhausted = True

    def renewal(self) -> list[Command]:
        """The commands of a heartbeat; `renewed` takes their answers."""
        return [
            (self.lane, ("PEXPIRE", self.lane, int(LEASE * 1000))),
            (self._boot_key, ("GETRANGE", self._boot_key, 0, _BOOT_BYTES - 1)),
            (self.lane, ("MEMORY", "USAGE", self.lane)),
        ]

    def renewed(self, sent: float, existed: object, boot: object, size: object = 0) -> Found:
        """What the answers to a `renewal` mean. Makes the lane if it is missing, or has to be replaced.

        Args:
            sent: when the commands were sent, by `time.monotonic`.
            existed, boot, size: the answers.

        Raises:
            Refused: the server does not support the commands, or the keys hold something else.
            BrokerUnreachable: the lane could not be made, e.g. because the server's memory is full.
        """
        if problem := failed(existed) or failed(boot):
            raise Refused(f"it is not Redis 7 or Valkey, or its keys are in use for something else: {problem}")
        joined, absent = self.lanes_made > 0, sent - self.heard
        self.heard = time.monotonic()
        forgot = self._compare_boot(boot or self._set_boot()) and joined
        if joined and self.disconnected:
            # Other peers may have been unable to renew their leases for as long.
            self._early_until = max(self._early_until, sent + min(GRACE, absent + HEARTBEAT))
        if forgot:
            self._early_until = sent + GRACE
        if isinstance(size, int) and size > MAX_LANE:
            # Only senders that break the rules fill it so far. What honest ones lose by it, they send again.
            log.warning("the lane of this peer held %d bytes and was emptied: a member floods it", size)
            self._is_exhausted = True
        if not existed or self._is_exhausted:
            self._make_lane()
        returned, self.disconnected = self.disconnected, False
        self.lanes_made = max(self.lanes_made, 1)
        if not joined:
            return Found.NOTHING
        away, self._away = self._away or absent >= LEASE, False
        if not existed and not forgot and away:
            return Found.LEASE_ENDED
        # A server that changes its boot all the time must not make this peer send everything again each time.
        if (returned or forgot or not existed) and sent >= self._next_reset:
            self._next_reset = sent + HEARTBEAT
            return Found.RESET
        return Found.NOTHING

    def _set_boot(self) -> object:
        """Marks the server, which lacks a mark. No worker can change it later. Returns the mark that it has now."""
        if not self._sets_boot:
            return b""
        key = self._boot_key
        commands = (("SETNX", key, self._own_boot), ("GETRANGE", key, 0, _BOOT_BYTES - 1))
        _, boot = self._connections.run_allowed([(key, words) for words in commands])
        return boot

    def _compare_boot(self, found: object) -> bool:
        """Whether the server has lost its data since the last heartbeat: `boot`, once set, never changes."""
        boot = found if isinstance(found, bytes) and found else None
        known, self._boot = self._boot, boot or self._boot
        return boot is not None and known not in (None, boot)

    def _make_lane(self) -> None:
        """Makes an empty lane under a lease. Peers add only to lanes that exist, and notice one that is missing."""
        lane = self.lane
        commands = (
            ("MULTI",),
            ("DEL", lane),
            ("XADD", lane, "*", *entry(b"", b"")),
            ("XTRIM", lane, "MAXLEN", 0),
            ("PEXPIRE", lane, int(LEASE * 1000)),
            ("EXEC",),
        )
        answers = self._connections.run_allowed([(lane, words) for words in commands])
        if any(isinstance(answer, OutOfMemoryError) for answer in answers):
            raise Unreachable(f"{self._connections.shown}: {OUT_OF_MEMORY}")
        self._is_exhausted = False
        self.lanes_made += 1

    def end(self, more: Sequence[Command] = ()) -> None:
        """Deletes the lane, so watching peers need not wait for the lease to end. Runs the commands `more`, too."""
        self._connections.run_allowed([(self.lane, ("DEL", self.lane)), *more])
        self._away, self.disconnected = True, False
        self.heard = time.monotonic()
