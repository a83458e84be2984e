"""The connections of the broker's socket: whose each is, what it makes libzmq hold, and when it has to end.

libzmq bounds the messages of a connection once they are complete. What it has read of an unfinished message, or of
a handshake, counts for nothing there. So the broker compares what the kernel received over a connection with the
messages that came out of it; the rest lies in libzmq's memory.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import recv_monitor_message

from split_common.transport import tcp
from split_common.transport.base import HEARTBEAT, MISSED
from split_common.transport.progress import CURVE_OVERHEAD, LEAST_PROGRESS, UNFINISHED_BYTES, wire_size
from split_common.trust.shares import newest_of_largest

#: Connections of members that stand at a time, and those on which nobody has announced itself yet.
MAX_CONNECTIONS = 4096
MAX_STRANGERS = 2048

#: Seconds that a connection may stand without a member that announces itself.
STRANGER_LIFETIME = 10.0

#: Seconds after which the connection of a member that was revoked is ended. The roster tells it why meanwhile.
REVOKED_LIFETIME = HEARTBEAT * MISSED

#: Bytes that libzmq may hold of a connection on which nobody has announced itself.
STRANGER_BYTES = 1024 * 1024

_ACCEPTED, _DISCONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_DISCONNECTED)


@dataclass(eq=False)
class Connection:
    """One connection that libzmq has accepted."""

    fd: int
    inode: int
    #: How the ROUTER socket names it; None until its first message.
    route: bytes | None = None
    #: The member whose peer is announced on it; empty if nobody is.
    member: str = ""
    #: Time at which it is ended unless somebody announces itself.
    until: float = field(default_factory=lambda: time.monotonic() + STRANGER_LIFETIME)
    #: Bytes on the wire of the messages that were read from it and written to it.
    taken: int = 0
    handed: int = 0
    #: Bytes read at the last look at a silent peer; None if its peer was not silent.
    looked_at: int | None = None
    #: When a part of a message last came from a silent peer, by `time.monotonic`, which begins near 0.
    moved: float = -math.inf

    def unread(self) -> int | None:
        """Bytes that libzmq has read and not passed on; None where they cannot be counted."""
        traffic = tcp.traffic(self.fd, self.inode)
        return None if traffic is None else traffic.read - self.taken

    def unsent(self) -> int | None:
        """Bytes that were written and that the peer's kernel does not have yet; None where it is unknown."""
        traffic = tcp.traffic(self.fd, self.inode)
        return None if traffic is None else max(0, self.handed - traffic.acknowledged)


class Connections:
    """All connections of a socket. Only the thread of the broker's loop uses them.

    Args:
        sock: the socket, which is not bound yet.
        curve: whether it will use CURVE.
        counters: count connections that are ended, by reason.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        sock: zmq.Socket[bytes],
        curve: bool,
        counters: Counter[str],
    ) -> None:
        self._counters = counters
        self._sock = sock
        self._overhead = CURVE_OVERHEAD if curve else 0
        # By descriptor, oldest first: those of members, and the others.
        self._members: dict[int, Connection] = {}
        self._strangers: dict[int, Connection] = {}
        self._routes: dict[bytes, Connection] = {}
        sock.monitor("inproc://connections", _ACCEPTED | _DISCONNECTED)
        self._monitor = context.socket(zmq.PAIR)
        # A full one would hold up libzmq's thread.
        self._monitor.rcvhwm = 0
        self._monitor.linger = 0
        self._monitor.connect("inproc://connections")

    def close(self) -> None:
        self._sock.disable_monitor()
        self._monitor.close()

    def __iter__(self) -> Iterator[Connection]:
        """Those of strangers first."""
        yield from list(self._strangers.values())
        yield from list(self._members.values())

    # --- what happens to them --------------------------------------------------------------------------------

    def follow(self) -> None:
        """Takes note of connections that were made and lost. Ends the oldest of too many strangers."""
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                break
            fd = int(event["value"])
            self._forget(fd)
            if event["event"] == _ACCEPTED:
                self._strangers[fd] = Connection(fd, tcp.inode(fd))
        while len(self._strangers) > MAX_STRANGERS:
            self.end(next(iter(self._strangers.values())), "too_many")

    def took(self, frames: Sequence[zmq.Frame]) -> None:
        """Counts a message as it was read from the socket, with its envelope. Ends a connection if it was cut."""
        connection = self._of(frames[0])
        if connection is None:
            return
        if frames[-1].more:
            self.end(connection, "too_many_frames")
            return
        for frame in frames[1:]:
            connection.taken += wire_size(len(frame), self._overhead)

    def gave(self, route: bytes, message: Sequence[zmq.Frame | bytes]) -> None:
        """Counts a message that was written to a connection."""
        if (connection := self._routes.get(route)) is not None:
            for frame in message:
                connection.handed += wire_size(len(frame), self._overhead)

    def announced(self, route: bytes, member: str) -> None:
        """A member's peer is announced on a connection. Ends one if members have too many."""
        connection = self._routes.get(route)
        if connection is None or connection.member == member:
            return
        self._strangers.pop(connection.fd, None)
        self._members[connection.fd] = connection
        connection.member = member
        while len(self._members) > MAX_CONNECTIONS:
            self.end(newest_of_largest(self._members.values(), lambda one: one.member), "too_many")

    def left(self, route: bytes, lifetime: float | None = None) -> None:
        """No peer is announced on a connection any more; it ends after `lifetime` seconds if none is again."""
        connection = self._routes.get(route)
        if connection is None:
            return
        self._members.pop(connection.fd, None)
        self._strangers[connection.fd] = connection
        connection.member = ""
        connection.until = time.monotonic() + (STRANGER_LIFETIME if lifetime is None else lifetime)

    def excuse(self, held_up: float) -> None:
        """Extends strangers' time by that for which the broker itself stalled."""
        for connection in self._strangers.values():
            connection.until += held_up

    # --- what they hold --------------------------------------------------------------------------------------

    def unsent(self, route: bytes) -> int:
        """Bytes, at least, that were written to a connection and have not reached its peer."""
        connection = self._routes.get(route)
        return (connection.unsent() or 0) if connection is not None else 0

    def last_sign(self, route: bytes, seen: float, now: float) -> float:
        """When there was a sign of a peer: a heartbeat or, if that is late, bytes of what lies before the next one.

        Args:
            seen: when its last heartbeat came.
            now: the time, by `time.monotonic`.
        """
        connection = self._routes.get(route)
        if connection is None:
            return seen
        late = now - seen > 2 * HEARTBEAT
        traffic = tcp.traffic(connection.fd, connection.inode) if late else None
        if traffic is None:
            connection.looked_at = None
        elif connection.looked_at is None:
            connection.looked_at = traffic.read
        elif traffic.read - connection.looked_at >= LEAST_PROGRESS:
            connection.looked_at, connection.moved = traffic.read, now
        return max(seen, connection.moved)

    def overdue(self, now: float) -> list[Connection]:
        """Connections whose time without a member is over."""
        return [connection for connection in self._strangers.values() if now > connection.until]

    def hoarding(self, members: bool) -> list[Connection]:
        """Connections with an unfinished message, or handshake, larger than any has to be.

        It means something only if the socket has no complete message left, before this call and after it.

        Args:
            members: whether to look at those of members, too.
        """
        found = [one for one in self._strangers.values() if (one.unread() or 0) > STRANGER_BYTES]
        if members:
            found += [one for one in self._members.values() if (one.unread() or 0) > UNFINISHED_BYTES]
        return found

    def end_route(self, route: bytes, why: str) -> None:
        """Ends the connection with a route, if it still stands."""
        if (connection := self._routes.get(route)) is not None:
            self.end(connection, why)

    def end(self, connection: Connection, why: str) -> None:
        """Ends a connection; its peer may make another one."""
        self._forget(connection.fd)
        if tcp.shut(connection.fd, connection.inode):
            self._counters[f"connections_{why}"] += 1

    # -----------------------------------------------------------------------------------------------------------

    def _of(self, envelope: zmq.Frame) -> Connection | None:
        """The connection over which a message came; None if it has ended meanwhile."""
        route = envelope.bytes
        if (connection := self._routes.get(route)) is not None:
            return connection
        try:
            fd = int(envelope.get(zmq.SRCFD))
        except zmq.ZMQError:
            return None
        if fd not in self._members and fd not in self._strangers:
            self.follow()
        connection = self._strangers.get(fd) or self._members.get(fd)
        if connection is not None:
            self._routes.pop(connection.route or b"", None)
            connection.route = route
            self._routes[route] = connection
        return connection

    def _forget(self, fd: int) -> None:
        for known in (self._strangers, self._members):
            if (connection := known.pop(fd, None)) is not None and connection.route is not None:
                self._routes.pop(connection.route, None)
