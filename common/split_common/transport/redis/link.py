"""The Redis transport, without a broker process: the threads that read and write a peer's streams.

One thread writes to other peers' lanes (`writer`), one reads the peer's own lane (`reader`), and one sends
heartbeats, watches other peers and places a device's opens (`housekeeping`). Each has its own connections, so it
never waits for another thread's answers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from split_common.errors import BrokerUnreachable, Malformed, SplitError
from split_common.protocol import headers
from split_common.transport.base import HEARTBEAT, MISSED, Handler
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.housekeeping import Housekeeper, Inbox
from split_common.transport.redis.key_names import Keys, entry, read_entry
from split_common.transport.redis.lease import Lease
from split_common.transport.redis.membership import Registry
from split_common.transport.redis.opens import DeviceOpens
from split_common.transport.redis.reader import Reader
from split_common.transport.redis.server import RedisConnections, RedisConnector
from split_common.transport.redis.writer import LINGER, Outgoing, Writer
from split_common.transport.supervised import Supervisor, count_dropped
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Identity, Role

_T = TypeVar("_T")


class RedisLink:
    """A peer's connection to Redis or Valkey (`split_common.transport.base.Transport`).

    Args:
        address: of the form that `split_common.transport.address.parse_redis` expects.
        fleet: its roster and keys apply.
        identity: of the member that connects, which the peer's announcements name.

    Raises:
        ConfigError: an option in the address is wrong.
    """

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        self._server = RedisConnector(address)
        self._fleet = fleet
        self._certificate = identity.certificate_bytes
        self._parts: _Parts | None = None
        #: Messages dropped because they broke the protocol, by type of error; and bytes and messages moved.
        self.counters: Counter[str] = Counter()

    @property
    def alive(self) -> bool:
        return self._parts is not None and time.monotonic() - self._parts.lease.heard < HEARTBEAT * MISSED

    @property
    def sending(self) -> bool:
        return False

    def start(self, handler: Handler, timeout: float) -> None:
        caller = Caller(handler, self.counters)
        parts = self._parts = _Parts(
            self._server, self._fleet, self._certificate, handler.announcement(), caller, self.counters
        )
        parts.start_housekeeping()
        if not parts.housekeeper.settled.wait(timeout) or parts.housekeeper.failure:
            why = parts.housekeeper.failure or self._server.silence
            self.close()
            raise BrokerUnreachable(f"{why} (tried for at most {timeout:g} s)")
        parts.start()

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        headers.check_body(body)
        if self._parts is not None:
            self._parts.send(header, body)

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        if self._parts is None:
            return events.get(timeout=timeout)
        return self._parts.reader.leader_lock.receive(events, timeout)

    def announce(self) -> None:
        if self._parts is not None:
            self._parts.housekeeper.announce()

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()
        self._server.close()


class _Parts:
    """The parts of a link. They are made once its handler has announced the peer.

    Args:
        server: makes connections to the server.
        fleet: its roster and keys apply.
        certificate: of the member, as the operator signed it.
        first: the peer's first announcement.
        caller: calls the peer's handler.
        counters: of the link.
    """

    def __init__(
        self,
        server: RedisConnector,
        fleet: Fleet,
        certificate: bytes,
        first: headers.Announce,
        caller: Caller,
        counters: Counter[str],
    ) -> None:
        self._server = server
        self._caller = caller
        self._counters = counters
        self._me = first.sender
        self._other_role: Role = "worker" if first.role == "device" else "device"
        self._closing = threading.Event()
        self._supervisor = Supervisor("a thread of a Redis link", counters, self._closing)
        self._opened: list[RedisConnections] = []
        self._threads: list[threading.Thread] = []
        self._keys = keys = Keys(fleet.operator_key)
        self._inbox = Inbox()

        connections = self._new_connections()
        self.lease = Lease(connections, keys, first)
        self.registry = Registry(connections, keys, fleet, certificate, counters)
        self.writer = Writer(self._new_connections(), self.registry, caller, self._inbox.undelivered, counters)
        self.device_opens: DeviceOpens | None = None
        if first.role == "device":
            self.device_opens = DeviceOpens(connections, keys, self.registry, caller)
        self.housekeeper = Housekeeper(
            connections,
            keys,
            fleet,
            caller,
            first,
            self._inbox,
            self.lease,
            self.registry,
            self.device_opens,
            counters,
        )
        self.reader = Reader(
            self._new_connections(),
            self.lease,
            self._take,
            self._replace_lane,
            self._supervisor,
            counters,
            self._closing,
        )

    def _new_connections(self) -> RedisConnections:
        connections = RedisConnections(self._server)
        self._opened.append(connections)
        return connections

    def start_housekeeping(self) -> None:
        self._start(self.housekeeper.run, "housekeeper")

    def start(self) -> None:
        """Starts all other threads. The lane must exist."""
        self._start(self.writer.run, "writer")
        self._start(self.reader.run, "reader")

    def _start(self, loop: Callable[[], None], name: str) -> None:
        self._threads.append(self._supervisor.start(loop, f"lambda-split-redis-{name}"))

    def send(self, header: headers.Header, body: bytes) -> None:
        if isinstance(header, headers.Open):
            self._inbox.open(header, body)
        elif isinstance(header, headers.Relay):
            if self.device_opens is not None and header.channel == self.device_opens.unproven:
                self.device_opens.used(header)
            lane = self._keys.lane(self._other_role, header.to)
            head = headers.encode_header(header)
            command = lane, ("XADD", lane, "NOMKSTREAM", "*", *entry(head, body))
            self.writer.put(Outgoing(command, header, len(head) + len(body)))

    def close(self) -> None:
        self._closing.set()
        self.writer.close()
        self.housekeeper.close()
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        deadline = time.monotonic() + 2 * LINGER
        for thread in others[:2]:
            # The housekeeper deletes the lane, and the writer writes what is queued.
            thread.join(max(0.0, deadline - time.monotonic()))
        for connections in self._opened:
            connections.close()
        for thread in others:
            # A thread that is connecting cannot be woken; it ends by itself.
            thread.join(LINGER)

    # --- reading -------------------------------------------------------------------------------------------

    def _take(self, fields: Any) -> None:
        """Takes an entry that another peer added."""
        try:
            header, body = self._read_message(fields)
        except SplitError as error:
            count_dropped(self._counters, error)
            return
        if (
            self.device_opens is not None
            and isinstance(header, headers.Relay)
            and header.kind == headers.RelayKind.ANSWER
        ):
            self.device_opens.answered(header.channel)
        self._caller.message(header, body)

    def _read_message(self, fields: Any) -> tuple[headers.Relay | headers.Open, bytes]:
        """The message in an entry. A peer must not send what only a broker would.

        Raises:
            Malformed, Oversized, VersionMismatch: it is not a message to this peer.
        """
        head, body = read_entry(fields)
        self._counters["messages_received"] += 1
        self._counters["bytes_received"] += len(head) + len(body)
        header = headers.decode_header(head)
        headers.check_body(body)
        if isinstance(header, headers.Relay) and header.to != self._me:
            raise Malformed("a message for another peer")
        if not isinstance(header, headers.Relay | headers.Open):
            raise Malformed(f"a peer sent a {type(header).__name__}")
        return header, body

    def _replace_lane(self) -> None:
        self.lease.replace_lane()
        self.housekeeper.announce()
