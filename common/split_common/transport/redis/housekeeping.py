"""What a ZeroMQ broker does for its peers, and a Redis link does itself: heartbeats and watching other peers.

One thread renews the lease on the peer's lane (`lease`), checks the leases of the peers that this one watches and
keeps a worker's announcement where devices find it (`membership`), places a device's open (`opens`), and compares
rosters (`roster`).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter

import msgspec

from split_common.errors import BrokerUnreachable
from split_common.protocol import headers
from split_common.transport.base import HEARTBEAT
from split_common.transport.placement import GONE, full
from split_common.transport.redis.answers import Refused
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.eviction import refuse_eviction
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.lease import Found, Lease
from split_common.transport.redis.membership import Registry
from split_common.transport.redis.opens import DeviceOpens
from split_common.transport.redis.roster import RosterSync
from split_common.transport.redis.server import RECONNECT, RECONNECT_MAX, REFUSED_PAUSE, RedisConnections
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Role

log = logging.getLogger(__name__)

#: Seconds between two checks of the leases of a device's workers, and of its open.
WATCH_INTERVAL = 0.2


class Inbox:
    """What other threads of a link hand to the housekeeper. The garbage collector may call its methods, too."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[headers.Open, bytes] | headers.Relay | None] = queue.SimpleQueue()

    def open(self, header: headers.Open, body: bytes) -> None:
        """The device looks for a worker."""
        self._items.put((header, body))

    def undelivered(self, header: headers.Relay) -> None:
        """The receiver of a message has no lane: it is gone, or the server has just lost its data."""
        self._items.put(header)

    def wake(self) -> None:
        self._items.put(None)

    def take(self, timeout: float) -> list[tuple[headers.Open, bytes] | headers.Relay | None]:
        """All items, after waiting at most `timeout` seconds for the first one."""
        items = []
        with contextlib.suppress(queue.Empty):
            items.append(self._items.get(timeout=timeout))
            while True:
                items.append(self._items.get_nowait())
        return items


class Housekeeper:
    """Renews one peer's lease and watches other peers. `run` is its thread.

    Args:
        connections: to the server; this thread's own.
        keys, fleet: names of the fleet's keys, and the fleet, whose roster applies.
        caller: calls the peer's handler.
        first: the peer's first announcement.
        inbox: what other threads hand to this one.
        lease, registry: the lease on the peer's lane, and the other peers.
        device_opens: a device's opens; None for a worker.
        counters: where rosters that are refused are counted.
    """

    def __init__(
        self,
        connections: RedisConnections,
        keys: Keys,
        fleet: Fleet,
        caller: Caller,
        first: headers.Announce,
        inbox: Inbox,
        lease: Lease,
        registry: Registry,
        device_opens: DeviceOpens | None,
        counters: Counter[str],
    ) -> None:
        self._connections = connections
        self._fleet = fleet
        self._caller = caller
        self._announcement = first
        self._inbox = inbox
        self._lease = lease
        self._registry = registry
        self._device_opens = device_opens
        self._is_listed = first.role == "worker" and first.service is not None
        own_copy = first.member if first.role == "worker" else ""
        self._rosters = RosterSync(connections, keys, fleet, own_copy, counters)
        self._other_role: Role = "worker" if first.role == "device" else "device"
        self._watch_interval = WATCH_INTERVAL if first.role == "device" else HEARTBEAT
        #: Set when the server has answered for the first time, or has refused this user.
        self.settled = threading.Event()
        #: Why the server could not be used at the last attempt; empty while it can be used.
        self.failure = ""
        self._closing = threading.Event()
        # Messages whose receivers had no lane.
        self._undelivered: list[headers.Relay] = []
        self._watching: set[bytes] = set()
        self._next_beat = self._next_watch = 0.0
        self._pause = RECONNECT

    def announce(self) -> None:
        """Makes the thread send a heartbeat at once."""
        self._next_beat = 0.0
        self._inbox.wake()

    def close(self) -> None:
        self._closing.set()
        self._inbox.wake()

    # --- the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self._closing.is_set():
            self._take_inbox()
            if self._closing.is_set():
                break
            try:
                self._turn()
                self._pause = RECONNECT
            except BrokerUnreachable as error:
                self._wait_for_server(error)
        self._leave()

    def _take_inbox(self) -> None:
        busy = self._device_opens is not None and (self._device_opens.waiting or self._watching)
        wait = WATCH_INTERVAL if busy else max(0.0, self._next_beat - time.monotonic())
        for item in self._inbox.take(0.0 if self._lease.disconnected else wait):
            if isinstance(item, headers.Relay):
                self._undelivered.append(item)
            elif item is not None and self._device_opens is not None:
                self._device_opens.take(*item)

    def _turn(self) -> None:
        now = time.monotonic()
        if self._lease.disconnected or self._undelivered or now >= self._next_beat:
            self._next_beat = now + HEARTBEAT
            self._beat()
        if now >= self._next_watch:
            self._next_watch = now + self._watch_interval
            self._watch()
        if self._undelivered:
            self._return_to_sender()
        if self._device_opens is not None:
            self._device_opens.place(self._lease.early)

    def _wait_for_server(self, error: BrokerUnreachable) -> None:
        if not self._lease.disconnected:
            log.warning("%s", error)
        self._lease.disconnected = True
        self.failure = str(error)
        if isinstance(error, Refused):
            # The start fails. Later, somebody may put it right.
            self.settled.set()
            self._closing.wait(REFUSED_PAUSE)
            return
        self._closing.wait(self._pause)
        self._pause = min(2 * self._pause, RECONNECT_MAX)

    # --- heartbeats ----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        sent = time.monotonic()
        self._announcement = self._caller.announcement() or self._announcement
        self._watching = set(self._announcement.watching)
        if self._announcement.leaving:
            # Until the next announcement without `leaving`: the peer is alive, but of no use to others.
            self._withdraw()
            return
        if self._lease.lanes_made == 0 and self._connections.may_ask_all:
            refuse_eviction(self._connections, self._lease.lane, self._connections.shown)
        renewal, rosters = self._lease.renewal(), self._rosters.commands()
        answers = self._connections.run_allowed([*renewal, *rosters])
        match self._lease.renewed(sent, *answers[: len(renewal)]):
            case Found.LEASE_ENDED:
                self._caller.gone(list(self._watching))
            case Found.RESET:
                self._caller.reset()
        if self._is_listed:
            self._enlist()
        if self._device_opens is not None:
            self._device_opens.trials.answered(self._announcement.answered)
        self.failure = ""
        self.settled.set()
        if self._rosters.compare(answers[len(renewal) :]):
            self._caller.roster()

    def _enlist(self) -> None:
        """Puts a worker with a service where devices find it, unless it is revoked."""
        member = self._fleet.roster().by_name(self._announcement.member)
        revoked = member is None or member.revoked
        announcement = msgspec.structs.replace(self._announcement, leaving=revoked)
        self._registry.enlist(announcement, tidy=not self._lease.early)

    def _withdraw(self) -> None:
        self._lease.end()
        if self._is_listed:
            self._registry.enlist(msgspec.structs.replace(self._announcement, leaving=True), tidy=False)

    def _leave(self) -> None:
        for _ in range(2):
            try:
                self._withdraw()
                return
            except BrokerUnreachable as error:
                # A broken connection is replaced once.
                log.debug("the lane was not deleted: %s", error)

    # --- other peers -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Tells the handler which watched peers are gone."""
        gone = self._registry.watch(self._other_role, self._watching)
        if gone and not self._lease.early:
            self._watching.difference_update(gone)
            self._caller.gone(gone)

    def _return_to_sender(self) -> None:
        """Refuses messages whose receivers had no lane.

        Called after a heartbeat, which would have noticed a server that has lost its data.
        """
        back = self._registry.alive(self._other_role, {header.to for header in self._undelivered})
        undelivered, self._undelivered = self._undelivered, []
        for header in undelivered:
            returning = self._lease.early or header.to in back
            self._caller.refuse(header, full("the server has just started") if returning else GONE)
