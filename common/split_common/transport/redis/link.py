"""The Redis transport: a peer's lane, the streams that it adds to, and the threads that read and write them.

There is no broker process. One thread writes: it adds whatever is queued, and takes out of the peer's own lane
what was read, in one round trip. One reads the lane; a worker has another one that reads its service's wishes while
there is room. A fourth keeps leases (`split_common.transport.redis.keeper`). Each has connections of its own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import OutOfMemoryError, ResponseError

from split_common import wire
from split_common.errors import BrokerUnreachable, Malformed, Oversized, SplitError
from split_common.fleet import Fleet
from split_common.keys import Identity
from split_common.transport import HEARTBEAT, MISSED, Handler, count_dropped
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.keeper import RECONNECT, RECONNECT_MAX, RETRY_AFTER, Keeper
from split_common.transport.redis.keys import GROUP, Keys, entry, next_id, read_entry
from split_common.transport.redis.server import Command, Line, Refused, Server
from split_common.transport.zmq_link import OUTBOX_BYTES

#: Bytes of messages that are added in one round trip, unless a single one is larger.
BATCH_BYTES = 4 * 1024 * 1024

#: Entries that are read in one round trip.
READ_COUNT = 16

#: Milliseconds that a read waits for an entry.
READ_WAIT = 1000

#: Reads in a row that find nothing though the lane holds something, before it is read from its beginning.
OVERLOOKED = 2

#: Seconds after which read entries are taken out of the lane though nothing is written; and bytes of them.
TRIM_DELAY = 0.2
TRIM_BYTES = 4 * 1024 * 1024

#: Seconds that closing may take to write what is queued.
LINGER = 0.5

log = logging.getLogger(__name__)


@dataclass
class Outgoing:
    """A command to be sent; `header` and `size` of a message."""

    command: Command
    header: wire.Relay | None = None
    size: int = 0


class RedisLink:
    """A peer's connection to Redis or Valkey (`split_common.transport.Transport`).

    Args:
        address: as `split_common.address.parse_redis` takes it apart.

    Raises:
        ConfigError: an option in the address is wrong.
    """

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        self._server = Server(address)
        self._fleet = fleet
        self._member = identity.certificate.name
        self._keys = Keys(fleet.operator_key)
        # What `send` hands over to the writer, which alone counts what it has not sent yet. None just wakes it.
        self._handed: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._unsent: deque[Outgoing] = deque()
        self._unsent_bytes = 0
        # The least id that was not read yet in the own lane, and the bytes read since it was last cut.
        self._unread = "0-0"
        self._read_bytes = 0
        self._closing = threading.Event()
        self._lines: list[Line] = []
        self._threads: list[threading.Thread] = []
        self._keeper: Keeper | None = None
        #: Messages dropped because they broke the protocol, by type of error; and bytes and messages moved.
        self.counters: Counter[str] = Counter()

    @property
    def alive(self) -> bool:
        return self._keeper is not None and time.monotonic() - self._keeper.heard < HEARTBEAT * MISSED

    def start(self, handler: Handler, timeout: float) -> None:
        first = handler.announcement()
        self._me = first.sender
        self._caller = Caller(handler, self.counters)
        keeper = self._keeper = Keeper(
            self._line(), self._keys, self._fleet, self._caller, first, self._take_open, self.counters
        )
        self._start_thread(keeper.run, "keeper")
        if not keeper.settled.wait(timeout) or keeper.failure:
            why = keeper.failure or self._server.silence
            self.close()
            raise BrokerUnreachable(f"{why} (tried for at most {timeout:g} s)")
        self._start_thread(self._write, "writer")
        self._start_thread(self._read, "reader")
        if keeper.opens is not None:
            self._start_thread(self._read_opens, "opens")

    def _line(self) -> Line:
        line = Line(self._server)
        self._lines.append(line)
        return line

    def _start_thread(self, run: Callable[[], None], name: str) -> None:
        def contained() -> None:
            while True:
                try:
                    return run()
                except Exception:
                    self.counters["failures"] += 1
                    log.exception("the %s of a Redis link failed, and goes on", name)
                    self._closing.wait(RECONNECT)

        thread = threading.Thread(target=contained, name=f"lambda-split-redis-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def send(self, header: wire.Header, body: bytes = b"") -> None:
        if len(body) > wire.MAX_BODY:
            raise Oversized(f"body of {len(body)} bytes (at most {wire.MAX_BODY})")
        if self._keeper is None:
            return
        if isinstance(header, wire.Open):
            self._keeper.wish(header, body)
        elif isinstance(header, wire.Relay):
            lane = self._keys.lane(self._keeper.other_role, header.to)
            head = wire.encode_header(header)
            command = lane, ("XADD", lane, "NOMKSTREAM", "*", *entry(head, body))
            self._handed.put(Outgoing(command, header, len(head) + len(body)))

    def announce(self) -> None:
        if self._keeper is not None:
            self._keeper.announce()

    def close(self) -> None:
        self._closing.set()
        self._handed.put(None)
        if self._keeper is not None:
            self._keeper.close()
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        deadline = time.monotonic() + 2 * LINGER
        for thread in others[:2]:
            # The keeper says good-bye, the writer writes what is queued.
            thread.join(max(0.0, deadline - time.monotonic()))
        for line in self._lines:
            line.close()
        for thread in others:
            # One that makes a connection just now cannot be woken; it ends by itself.
            thread.join(LINGER)
        self._server.close()

    # --- writing -------------------------------------------------------------------------------------------

    def _write(self) -> None:
        line = self._line()
        trimmed = self._unread
        pause, give_up = RECONNECT, float("inf")
        while True:
            self._collect()
            batch = self._next_batch()
            commands = [outgoing.command for outgoing in batch]
            if (unread := self._unread) != trimmed:
                lane = self._lane
                commands.append((lane, ("XTRIM", lane, "MINID", unread)))
            if commands:
                try:
                    answers = line.run(commands)
                except BrokerUnreachable as error:
                    # Sent again, though some of it may have arrived: sessions know by its number what they have.
                    self._unsent.extendleft(reversed(batch))
                    log.debug("not written: %s", error)
                    self._closing.wait(pause)
                    pause = min(2 * pause, RECONNECT_MAX)
                else:
                    pause, trimmed = RECONNECT, unread
                    for outgoing, answer in zip(batch, answers, strict=False):
                        self._written(outgoing, answer)
            if self._closing.is_set():
                give_up = min(give_up, time.monotonic() + LINGER)
                if (not self._unsent and self._handed.empty()) or time.monotonic() > give_up:
                    return

    @property
    def _lane(self) -> str:
        assert self._keeper is not None
        return self._keeper.lane

    def _collect(self) -> None:
        """Takes over what was handed in; waits for it if there is nothing to do."""
        with contextlib.suppress(queue.Empty):
            outgoing = self._handed.get(timeout=0.0 if self._unsent or self._closing.is_set() else TRIM_DELAY)
            while True:
                if outgoing is not None and self._unsent_bytes + outgoing.size > OUTBOX_BYTES:
                    self.counters["outbox_full"] += 1
                elif outgoing is not None:
                    self._unsent.append(outgoing)
                    self._unsent_bytes += outgoing.size
                outgoing = self._handed.get_nowait()

    def _next_batch(self) -> list[Outgoing]:
        """What is sent next. What is for a peer whose lane is full comes back to the sender."""
        assert self._keeper is not None
        batch: list[Outgoing] = []
        size = 0
        while self._unsent and size < BATCH_BYTES:
            outgoing = self._unsent.popleft()
            header = outgoing.header
            if header is not None and header.to in self._keeper.full:
                self._unsent_bytes -= outgoing.size
                self._keeper.bounce(header, "full", "the queue of the peer is full", RETRY_AFTER)
                continue
            batch.append(outgoing)
            size += outgoing.size
        return batch

    def _written(self, outgoing: Outgoing, answer: object) -> None:
        assert self._keeper is not None
        header = outgoing.header
        self._unsent_bytes -= outgoing.size
        if header is None:
            return
        if isinstance(answer, bytes):
            self.counters["messages_sent"] += 1
            self.counters["bytes_sent"] += outgoing.size
        elif isinstance(answer, ResponseError):
            if not isinstance(answer, OutOfMemoryError):
                count_dropped(self.counters, Refused(str(answer)))
            self._keeper.bounce(header, "full", "the server takes no more", 2 * RETRY_AFTER)
        else:
            self._keeper.undelivered(header)

    # --- reading -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._keeper is not None
        line, lane, made, overlooked = self._line(), self._lane, 0, 0
        while not self._closing.is_set():
            if made != self._keeper.lanes_made:
                made, self._unread = self._keeper.lanes_made, "0-0"
                after: bytes | str = "0-0"
            words = ("XREAD", "COUNT", READ_COUNT, "BLOCK", READ_WAIT, "STREAMS", lane, after)
            entries = self._entries(line, lane, words)
            overlooked = 0 if entries else overlooked + self._holds_something(line, lane)
            if overlooked >= OVERLOOKED:
                # An id was damaged on its way here, and what came later has a lower one.
                overlooked, after, self._unread = 0, "0-0", "0-0"
            for id_, fields in entries:
                after = id_
                self._take(fields)
                following = next_id(id_)
                if following is None:
                    self._keeper.renew_lane()
                else:
                    self._unread = following
            if self._read_bytes > TRIM_BYTES:
                self._read_bytes = 0
                self._handed.put(None)

    def _entries(self, line: Line, key: str, words: tuple[bytes | str | int, ...]) -> list[Any]:
        """The entries that a command reads; none, after a pause, when it cannot."""
        try:
            (answer,) = line.run([(key, words)])
        except BrokerUnreachable as error:
            log.debug("not read: %s", error)
            self._closing.wait(RECONNECT)
            return []
        if isinstance(answer, ResponseError):
            if "NOGROUP" in str(answer):
                assert self._keeper is not None
                with contextlib.suppress(BrokerUnreachable):
                    self._keeper.make_group(line)
            else:
                count_dropped(self.counters, Refused(str(answer)))
            self._closing.wait(RECONNECT)
            return []
        return answer[0][1] if answer else []

    def _holds_something(self, line: Line, lane: str) -> bool:
        try:
            (length,) = line.run([(lane, ("XLEN", lane))])
        except BrokerUnreachable:
            return False
        return isinstance(length, int) and length > 0

    def _take(self, fields: Any) -> None:
        """A message of another peer. What only a broker would say, no peer may."""
        try:
            head, body = read_entry(fields)
            self._read_bytes += len(body)
            self.counters["messages_received"] += 1
            self.counters["bytes_received"] += len(head) + len(body)
            header = wire.decode_header(head)
            wire.check_body(body)
            if isinstance(header, wire.Relay) and header.to != self._me:
                raise Malformed("a message for another peer")
            if not isinstance(header, wire.Relay | wire.Open):
                raise Malformed(f"a peer sent a {type(header).__name__}")
        except SplitError as error:
            count_dropped(self.counters, error)
            return
        if isinstance(header, wire.Relay) and header.kind == wire.Kind.ANSWER and self._keeper is not None:
            self._keeper.answered(header.channel)
        self._caller.message(header, body)

    def _read_opens(self) -> None:
        assert self._keeper is not None
        keeper, line = self._keeper, self._line()
        opens = keeper.opens
        assert opens is not None
        words = (
            *("XREADGROUP", "GROUP", GROUP, self._member, "COUNT", 1),
            *("BLOCK", READ_WAIT, "STREAMS", opens, ">"),
        )
        while not self._closing.is_set():
            if keeper.room <= 0:
                self._closing.wait(TRIM_DELAY)
                continue
            for id_, fields in self._entries(line, opens, words):
                self._take_open(id_, fields)
                if next_id(id_) is None:
                    with contextlib.suppress(BrokerUnreachable):
                        keeper.make_group(line, anew=True)

    def _take_open(self, id_: bytes, fields: Any) -> None:
        """A wish that waited for a worker; the answer is queued before it is taken out of the stream."""
        assert self._keeper is not None
        self._keeper.room -= 1
        self._take(fields)
        opens = self._keeper.opens
        assert opens is not None
        self._handed.put(Outgoing((opens, ("XACK", opens, GROUP, id_))))
        self._handed.put(Outgoing((opens, ("XDEL", opens, id_))))
