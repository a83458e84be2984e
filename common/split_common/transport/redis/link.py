"""The Redis transport: a peer's lane, the streams that it adds to, and the threads that read and write them.

There is no broker process. One thread writes (`writer`). One reads the peer's lane (`reader`); a worker has another
one that reads its service's wishes while there is room. A fourth keeps leases (`keeper`). Each has connections of
its own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from split_common import headers
from split_common.errors import BrokerUnreachable, Malformed, Oversized, SplitError
from split_common.fleet import Fleet
from split_common.keys import Identity
from split_common.transport import HEARTBEAT, MISSED, Handler, count_dropped
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.keeper import RECONNECT, Keeper
from split_common.transport.redis.keys import GROUP, Keys, entry, next_id, read_entry
from split_common.transport.redis.reader import READ_WAIT, Reader
from split_common.transport.redis.server import Line, Server
from split_common.transport.redis.writer import LINGER, Outgoing, Writer

#: Seconds between two looks whether there is room for another session.
ROOM_INTERVAL = 0.2

log = logging.getLogger(__name__)

_T = TypeVar("_T")


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
        self._closing = threading.Event()
        self._lines: list[Line] = []
        self._threads: list[threading.Thread] = []
        self._keeper: Keeper | None = None
        self._writer: Writer | None = None
        self._reader: Reader | None = None
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
        writer = self._writer = Writer(self._line(), keeper, self.counters)
        self._start_thread(keeper.run, "keeper")
        if not keeper.settled.wait(timeout) or keeper.failure:
            why = keeper.failure or self._server.silence
            self.close()
            raise BrokerUnreachable(f"{why} (tried for at most {timeout:g} s)")
        self._start_thread(writer.run, "writer")
        reader = self._reader = Reader(self._line(), keeper, self._take, self.counters, self._closing)
        self._start_thread(reader.run, "reader")
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

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        if len(body) > headers.MAX_BODY:
            raise Oversized(f"body of {len(body)} bytes (at most {headers.MAX_BODY})")
        if self._keeper is None or self._writer is None:
            return
        if isinstance(header, headers.Open):
            self._keeper.wish(header, body)
        elif isinstance(header, headers.Relay):
            lane = self._keys.lane(self._keeper.other_role, header.to)
            head = headers.encode_header(header)
            command = lane, ("XADD", lane, "NOMKSTREAM", "*", *entry(head, body))
            self._writer.put(Outgoing(command, header, len(head) + len(body)))

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        if self._reader is None:
            return events.get(timeout=timeout)
        return self._reader.lead.receive(events, timeout)

    def announce(self) -> None:
        if self._keeper is not None:
            self._keeper.announce()

    def close(self) -> None:
        self._closing.set()
        if self._writer is not None:
            self._writer.close()
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

    # --- reading -------------------------------------------------------------------------------------------

    def _take(self, fields: Any) -> None:
        """A message of another peer. What only a broker would say, no peer may."""
        try:
            head, body = read_entry(fields)
            self.counters["messages_received"] += 1
            self.counters["bytes_received"] += len(head) + len(body)
            header = headers.decode_header(head)
            headers.check_body(body)
            if isinstance(header, headers.Relay) and header.to != self._me:
                raise Malformed("a message for another peer")
            if not isinstance(header, headers.Relay | headers.Open):
                raise Malformed(f"a peer sent a {type(header).__name__}")
        except SplitError as error:
            count_dropped(self.counters, error)
            return
        if isinstance(header, headers.Relay) and header.kind == headers.Kind.ANSWER and self._keeper is not None:
            self._keeper.answered(header.channel)
        self._caller.message(header, body)

    def _read_opens(self) -> None:
        assert self._keeper is not None
        assert self._reader is not None
        keeper, line = self._keeper, self._line()
        opens = keeper.opens
        assert opens is not None
        words = (
            *("XREADGROUP", "GROUP", GROUP, self._member, "COUNT", 1),
            *("BLOCK", int(1000 * READ_WAIT), "STREAMS", opens, ">"),
        )
        while not self._closing.is_set():
            if keeper.room <= 0:
                self._closing.wait(ROOM_INTERVAL)
                continue
            for id_, fields in self._reader.entries(line, [(opens, words)]) or []:
                self._take_open(id_, fields)
                if next_id(id_) is None:
                    with contextlib.suppress(BrokerUnreachable):
                        keeper.make_group(line, anew=True)

    def _take_open(self, id_: bytes, fields: Any) -> None:
        """A wish that waited for a worker; the answer is queued before it is taken out of the stream."""
        assert self._keeper is not None
        assert self._writer is not None
        self._keeper.room -= 1
        self._take(fields)
        opens = self._keeper.opens
        assert opens is not None
        self._writer.put(Outgoing((opens, ("XACK", opens, GROUP, id_))))
        self._writer.put(Outgoing((opens, ("XDEL", opens, id_))))
