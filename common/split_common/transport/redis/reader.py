"""How a Redis link reads its peer's lane, whoever does (`split_common.transport.leading`)."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from split_common.errors import BrokerUnreachable
from split_common.transport.leading import Lead
from split_common.transport.redis.keeper import RECONNECT, Keeper
from split_common.transport.redis.keys import next_id
from split_common.transport.redis.server import Command, Line, Refused
from split_common.transport.supervised import count_dropped

#: Entries that are read in one round trip.
READ_COUNT = 16

#: Seconds that a read of the link's thread waits for an entry.
READ_WAIT = 1.0

#: Reads in a row that find nothing though the lane holds something, before it is read from its beginning.
OVERLOOKED = 2

#: Bytes that are read before they are cut off the lane; and seconds without an entry after which they are.
TRIM_BYTES = 256 * 1024
TRIM_DELAY = 0.2

log = logging.getLogger(__name__)


class Reader:
    """Reads a lane, until `closing` is set; `run` is its thread.

    Args:
        line: to the server; the reader's own.
        keeper: makes the lane.
        take: is handed the fields of each entry.
        counters: of the link.
    """

    def __init__(
        self,
        line: Line,
        keeper: Keeper,
        take: Callable[[Any], None],
        counters: Counter[str],
        closing: threading.Event,
    ) -> None:
        self._line = line
        self._keeper = keeper
        self._take = take
        self._counters = counters
        self._closing = closing
        #: Who reads.
        self.lead = Lead(self._read_contained, closing)
        # Of the lane: which one it is, its last entry read, the least id not read yet, and what is cut off already.
        self._lane_made = 0
        self._after: bytes | str = "0-0"
        self._unread = self._cut = "0-0"
        self._cut_bytes = 0
        self._found = False
        self._overlooked = 0

    def run(self) -> None:
        while not self._closing.is_set():
            self.lead.serve(READ_WAIT)

    # --- with the lead -------------------------------------------------------------------------------------

    def _read_contained(self, wait: float) -> None:
        try:
            self._read(wait)
        except Exception as error:
            # Damaged answers may look like anything. Nothing of them is believed: the lane is read anew.
            self._counters["failures"] += 1
            log.warning("reading a lane failed, and begins anew: %s", type(error).__name__)
            self._line.disconnect()
            self._lane_made = 0
            self._closing.wait(RECONNECT)

    def _read(self, wait: float) -> None:
        """Takes what comes within some seconds; cuts off what was read: much at a time, or when nothing comes."""
        lane = self._keeper.lane
        if self._lane_made != self._keeper.lanes_made:
            self._lane_made = self._keeper.lanes_made
            self._after = self._unread = self._cut = "0-0"
        commands: list[Command] = []
        received = self._counters["bytes_received"]
        if self._unread != self._cut and (not self._found or received - self._cut_bytes > TRIM_BYTES):
            commands.append((lane, ("XTRIM", lane, "MINID", self._unread)))
            self._cut, self._cut_bytes = self._unread, received
        if self._unread != self._cut:
            wait = min(wait, TRIM_DELAY)
        block = max(1, int(1000 * wait))
        commands.append((lane, ("XREAD", "COUNT", READ_COUNT, "BLOCK", block, "STREAMS", lane, self._after)))
        entries = self.entries(self._line, commands)
        if entries is None:
            # Whether anything was cut off is not known.
            self._cut = "0-0"
            return
        self._found = bool(entries)
        overlooked = not entries and self._unread == self._cut and self._holds_something()
        self._overlooked = self._overlooked + 1 if overlooked else 0
        if self._overlooked >= OVERLOOKED:
            # An id was damaged on its way here, and what came later has a lower one.
            self._after, self._unread, self._overlooked = "0-0", "0-0", 0
        for id_, fields in entries:
            following = next_id(id_)
            self._after = id_
            self._take(fields)
            if following is None:
                self._keeper.renew_lane()
            else:
                self._unread = following

    def entries(self, line: Line, commands: Sequence[Command]) -> list[Any] | None:
        """The entries that the last of some commands reads; None, after a pause, when it cannot."""
        try:
            *_, answer = line.run(commands)
        except BrokerUnreachable as error:
            log.debug("not read: %s", error)
            self._closing.wait(RECONNECT)
            return None
        if isinstance(answer, ResponseError):
            if "NOGROUP" in str(answer):
                with contextlib.suppress(BrokerUnreachable):
                    self._keeper.make_group(line)
            else:
                count_dropped(self._counters, Refused(str(answer)))
            self._closing.wait(RECONNECT)
            return None
        return answer[0][1] if answer else []

    def _holds_something(self) -> bool:
        lane = self._keeper.lane
        try:
            (length,) = self._line.run([(lane, ("XLEN", lane))])
        except BrokerUnreachable:
            return False
        return isinstance(length, int) and length > 0
