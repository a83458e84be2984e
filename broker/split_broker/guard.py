"""Ends connections that make the broker hold more than they may, and bars members that tried."""

from __future__ import annotations

import logging
from collections.abc import Callable

from split_broker.access import Authentication
from split_broker.connections import Connections
from split_broker.memory import MemoryWatch
from split_common.transport.base import HEARTBEAT
from split_common.trust.limited_log import LimitedLog

log = logging.getLogger(__name__)


class Guard:
    """What the broker's loop does about connections, several times a second.

    Args:
        connections: those of the broker's socket.
        authentication: bars members.
        memory: watches the process's memory; None if it is not the broker's alone.
        drained: whether the socket has no complete message left.
    """

    def __init__(
        self,
        connections: Connections,
        authentication: Authentication,
        memory: MemoryWatch | None,
        drained: Callable[[], bool],
    ) -> None:
        self._connections = connections
        self._authentication = authentication
        self._memory = memory
        self._drained = drained
        self._next_members = 0.0
        self._log = LimitedLog(log)

    def look(self, now: float) -> None:
        """Ends what has to end at the time `now`: members are looked at once a second, strangers each time."""
        self._connections.follow()
        if self._memory is not None:
            self._memory.check()
        for connection in self._connections.overdue(now):
            self._connections.end(connection, "idle")
        if not self._drained():
            return
        hoarding = self._connections.hoarding(members=now >= self._next_members)
        if now >= self._next_members:
            self._next_members = now + HEARTBEAT
        # Otherwise what they hold may be complete messages, which have arrived meanwhile.
        if not hoarding or not self._drained():
            return
        for connection in hoarding:
            sender = connection.member or "a stranger"
            self._log.warning(sender, "%s sent a message without an end", sender)
            if connection.member:
                self._authentication.bar(connection.member)
            self._connections.end(connection, "unfinished")
