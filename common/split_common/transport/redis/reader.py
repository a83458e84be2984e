"""How a Redis link reads its peer's lane: in the thread of whoever waits for a message, or else in its own.

A caller that waits reads himself, as the leader among those who wait (Schmidt et al., "Pattern-Oriented Software
Architecture", volume 2, 2000: leader/followers): his message need not change threads. He does so for a short while,
and only if nobody else reads. Otherwise the link's thread does, and leaves a gap for callers who come back soon.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from split_common.errors import BrokerUnreachable
from split_common.transport import count_dropped
from split_common.transport.redis.keeper import RECONNECT, Keeper
from split_common.transport.redis.keys import next_id
from split_common.transport.redis.server import Command, Line, Refused

#: Entries that are read in one round trip.
READ_COUNT = 16

#: Seconds that a read of the link's thread, and a caller's reading, wait for an entry.
READ_WAIT = 1.0
LEAD_WAIT = 0.05

#: Seconds after a caller had his message during which the link's thread leaves it to him to read again.
LEAD_GAP = 0.02

#: Reads in a row that find nothing though the lane holds something, before it is read from its beginning.
OVERLOOKED = 2

#: Bytes that are read before they are cut off the lane; and seconds without an entry after which they are.
TRIM_BYTES = 256 * 1024
TRIM_DELAY = 0.2

log = logging.getLogger(__name__)

_T = TypeVar("_T")


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
        # Held by who reads.
        self._turn = threading.Lock()
        # What callers wait for who do not read; and when one of those who wait or read last left.
        self._waiting: set[queue.SimpleQueue[Any]] = set()
        self._left = float("-inf")
        self._wanted = threading.Event()
        # Of the lane: which one it is, its last entry read, the least id not read yet, and what is cut off already.
        self._lane_made = 0
        self._after: bytes | str = "0-0"
        self._unread = self._cut = "0-0"
        self._cut_bytes = 0
        self._found = False
        self._overlooked = 0

    def run(self) -> None:
        while not self._closing.is_set():
            self._wanted.clear()
            with self._turn:
                if wanted := self._is_wanted():
                    self._read_contained(READ_WAIT)
            if not wanted:
                self._wanted.wait(LEAD_GAP)

    def _is_wanted(self) -> bool:
        """Whether the thread should read: somebody waits for it, or nobody will come back soon to read himself."""
        waiting = list(self._waiting)
        if any(events.empty() for events in waiting):
            return True
        return not waiting and time.monotonic() > self._left + LEAD_GAP

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        """The next of what a handler puts into `events`. Raises queue.Empty after `timeout` seconds."""
        until = time.monotonic() + timeout
        if events.empty() and self._turn.acquire(blocking=False):
            try:
                lead_until = min(until, time.monotonic() + LEAD_WAIT)
                while events.empty() and not self._closing.is_set() and (left := lead_until - time.monotonic()) > 0:
                    self._read_contained(left)
            finally:
                self._left = time.monotonic()
                self._turn.release()
        if not events.empty():
            return events.get_nowait()
        self._waiting.add(events)
        self._wanted.set()
        try:
            return events.get(timeout=max(0.0, until - time.monotonic()))
        finally:
            self._waiting.discard(events)
            self._left = time.monotonic()

    # --- with the turn -------------------------------------------------------------------------------------

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
