"""Reads a peer's own lane, on the thread that leads (`split_common.transport.leader`)."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from redis.exceptions import ResponseError

from split_common.errors import BrokerUnreachable
from split_common.transport.leader import LeaderLock
from split_common.transport.redis.answers import Refused
from split_common.transport.redis.key_names import next_id
from split_common.transport.redis.lease import Lease
from split_common.transport.redis.server import RECONNECT, Command, RedisConnections
from split_common.transport.supervised import Supervisor, count_dropped

#: Most entries that are read in one round trip, and the bytes that they should not exceed, going by the last ones.
READ_COUNT = 16
READ_BYTES = 8 * 1024 * 1024

#: Seconds that a read of the link's thread waits for an entry.
READ_WAIT = 1.0

#: Consecutive reads that find nothing though the lane is not empty, after which it is read from its beginning.
OVERLOOKED = 2

#: What has been read is trimmed from the lane after this many bytes, or after this many seconds without an entry.
TRIM_BYTES = 256 * 1024
TRIM_DELAY = 0.2

log = logging.getLogger(__name__)


class Reader:
    """Reads a lane, until `closing` is set. `run` is its thread.

    Args:
        connections: to the server; the reader's own.
        lease: makes the lane.
        take: is handed the fields of each entry.
        replace_lane: makes the next heartbeat replace the lane, because nothing more can be added to it.
        supervisor: counts errors, so none of them reaches a caller that reads.
        counters: of the link.
        closing: ends `run` when it is set.
    """

    def __init__(
        self,
        connections: RedisConnections,
        lease: Lease,
        take: Callable[[Any], None],
        replace_lane: Callable[[], None],
        supervisor: Supervisor,
        counters: Counter[str],
        closing: threading.Event,
    ) -> None:
        self._connections = connections
        self._lease = lease
        self._take = take
        self._replace_lane = replace_lane
        self._supervisor = supervisor
        self._counters = counters
        self._closing = closing
        #: Decides which thread reads.
        self.leader_lock = LeaderLock(self._read_supervised, closing)
        # Which lane this is, the last entry read, the least id not read yet, and the id below which it is trimmed.
        self._lane_made = 0
        self._after: bytes | str = "0-0"
        self._unread = self._cut = "0-0"
        self._cut_bytes = 0
        self._found = False
        self._overlooked = 0
        self._count = READ_COUNT

    def run(self) -> None:
        while not self._closing.is_set():
            self.leader_lock.serve(READ_WAIT)

    # --- on the thread that leads ----------------------------------------------------------------------------

    def _read_supervised(self, wait: float) -> None:
        if not self._supervisor.run(self._read, wait):
            # Damaged answers may look like anything, so all are discarded.
            self._connections.disconnect()
            self._resync()

    def _resync(self) -> None:
        """Reads the lane from its beginning. Sessions recognize repeated messages by their numbers."""
        self._after = self._unread = self._cut = "0-0"
        self._overlooked = 0

    def _read(self, wait: float) -> None:
        """Takes the entries that come within `wait` seconds."""
        if self._lane_made != self._lease.lanes_made:
            self._lane_made = self._lease.lanes_made
            self._resync()
        entries = self._entries(self._commands(wait))
        if entries is None:
            return
        self._found = bool(entries)
        if entries:
            self._overlooked = 0
        else:
            self._look_for_overlooked()
        begun = self._counters["bytes_received"]
        for id_, fields in entries:
            following = next_id(id_)
            self._after = id_
            self._take(fields)
            if following is None:
                self._replace_lane()
            else:
                self._unread = following
        if entries:
            size = (self._counters["bytes_received"] - begun) // len(entries)
            self._count = max(1, min(READ_COUNT, READ_BYTES // max(1, size)))

    def _commands(self, wait: float) -> list[Command]:
        """The commands of one read, which first trims the lane if `TRIM_BYTES` were read or nothing has come."""
        lane, commands = self._lease.lane, list[Command]()
        received = self._counters["bytes_received"]
        if self._unread != self._cut and (not self._found or received - self._cut_bytes > TRIM_BYTES):
            commands.append((lane, ("XTRIM", lane, "MINID", self._unread)))
            self._cut, self._cut_bytes = self._unread, received
        if self._unread != self._cut:
            wait = min(wait, TRIM_DELAY)
        block = max(1, int(1000 * wait))
        return [*commands, (lane, ("XREAD", "COUNT", self._count, "BLOCK", block, "STREAMS", lane, self._after))]

    def _entries(self, commands: list[Command]) -> list[Any] | None:
        """Runs commands, of which the last is a read. Returns its entries; None, after a pause, if that fails."""
        try:
            *_, answer = self._connections.run(commands)
        except BrokerUnreachable as error:
            log.debug("not read: %s", error)
        else:
            if not isinstance(answer, ResponseError):
                return answer[0][1] if answer else []
            count_dropped(self._counters, Refused(str(answer)))
        # It is not known whether the lane was trimmed.
        self._cut = "0-0"
        self._closing.wait(RECONNECT)
        return None

    def _look_for_overlooked(self) -> None:
        """Reads from the beginning if the lane holds entries that reads do not find.

        An id that was damaged on its way here may be larger than all later ones.
        """
        overlooked = self._unread == self._cut and self._holds_something()
        self._overlooked = self._overlooked + 1 if overlooked else 0
        if self._overlooked >= OVERLOOKED:
            self._resync()

    def _holds_something(self) -> bool:
        lane = self._lease.lane
        try:
            (length,) = self._connections.run([(lane, ("XLEN", lane))])
        except BrokerUnreachable:
            return False
        return isinstance(length, int) and length > 0
