"""What the ZeroMQ broker does for a peer, done by the peer itself: who lives, who serves what, which roster counts.

The keeper's thread renews the lease on the peer's own lane, looks after the leases of those that the peer watches,
keeps a worker's announcement where devices find it, and answers a device's wish for a worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from split_common import headers
from split_common.errors import BrokerUnreachable, SplitError
from split_common.fleet import Fleet
from split_common.keys import Role
from split_common.transport import GRACE, HEARTBEAT, MISSED, OPEN_PATIENCE, count_dropped
from split_common.transport.redis import roster
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.keys import GROUP, Keys, entry
from split_common.transport.redis.server import Command, Line, Refused, failed
from split_common.transport.redis.wishes import Wish, Wishes, lane_sizes, read_workers

log = logging.getLogger(__name__)

#: Seconds after which a lane expires, if its owner's heartbeat does not put it off.
LEASE = HEARTBEAT * MISSED

#: Seconds between two looks at the leases of a device's workers, and at its wish.
WATCH_INTERVAL = 0.2

#: Bytes in a lane above which senders are told that it is full.
LANE_BYTES = 256 * 1024 * 1024

#: Seconds after which the list of workers, and the wishes of a service, expire where there is no worker any more.
OPENS_LEASE = 60.0

#: Seconds to wait for the server to come back, first and at most; doubles each time.
RECONNECT = 0.05
RECONNECT_MAX = 0.5

#: Seconds that a writer waits for room in a lane, or for a peer to come back after a restart.
RETRY_AFTER = 0.5

#: Heartbeats between two clean-ups of the list of workers.
CLEAN_UP = 10


class Keeper:
    """The housekeeping of one peer's link; `run` is its thread.

    Args:
        line: to the server; the keeper's own.
        keys, fleet: how the keys are called, and whose roster counts.
        caller: the peer's handler.
        first: the peer's first announcement: who it is.
        take_open: is handed the wishes that another worker has read and not answered: entry's id and fields.
        counters: of the link.
    """

    def __init__(
        self,
        line: Line,
        keys: Keys,
        fleet: Fleet,
        caller: Caller,
        first: headers.Announce,
        take_open: Callable[[bytes, Any], None],
        counters: Counter[str],
    ) -> None:
        self._line = line
        self._keys = keys
        self._fleet = fleet
        self._caller = caller
        self._announcement = first
        self._take_open = take_open
        self._counters = counters
        self.role: Role = first.role
        self.other_role: Role = "worker" if first.role == "device" else "device"
        self.lane = keys.lane(first.role, first.sender)
        self.opens = keys.opens(first.service) if first.service is not None and first.role == "worker" else None
        #: Set when the server has answered for the first time, or will never.
        self.settled = threading.Event()
        #: Why the server could not be used when it was last tried; empty while it can.
        self.failure = ""
        #: When the server last answered.
        self.heard = 0.0
        #: How often the peer's lane was made: a reader of an older one starts anew.
        self.lanes_made = 0
        #: Watched peers whose lanes are full.
        self.full: frozenset[bytes] = frozenset()
        #: Sessions that this worker has room for, less the wishes that it took since it said so.
        self.room = 0
        self._closing = threading.Event()
        self._inbox: queue.SimpleQueue[Wish | headers.Relay | None] = queue.SimpleQueue()
        self._wishes = Wishes(line, keys, caller, counters)
        # Messages whose receivers had no lane.
        self._undelivered: list[headers.Relay] = []
        self._watching: set[bytes] = set()
        self._own_boot = os.urandom(8)
        self._boot: bytes | None = None
        self._broken = False
        self._spoiled = False
        # Whether the peer has taken itself out of the queue for a while.
        self._away = False
        self._early_until = 0.0
        self._next_beat = self._next_watch = self._next_reset = 0.0
        self._beats = 0
        self._server_time = 0
        self._roster_version = fleet.roster().version

    @property
    def early(self) -> bool:
        """Whether peers that are alive may not have made their lanes anew yet."""
        return time.monotonic() < self._early_until

    def wish(self, header: headers.Open, body: bytes) -> None:
        self._inbox.put(Wish(header, body))

    def undelivered(self, header: headers.Relay) -> None:
        """The receiver of a message has no lane: it is gone, or the server has just forgotten everything."""
        self._inbox.put(header)

    def announce(self) -> None:
        self._next_beat = 0.0
        self._inbox.put(None)

    def answered(self, channel: int) -> None:
        """A worker has answered the wish for this channel."""
        self._wishes.answered(channel)

    def renew_lane(self) -> None:
        """Nothing can be added to the lane any more: it needs a new one."""
        self._spoiled = True
        self.announce()

    def close(self) -> None:
        self._closing.set()
        self._inbox.put(None)

    # --- the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        pause = RECONNECT
        while not self._closing.is_set():
            try:
                self._turn()
                pause = RECONNECT
            except BrokerUnreachable as error:
                if not self._broken:
                    log.warning("%s", error)
                self._broken = True
                self.failure = str(error)
                if isinstance(error, Refused):
                    # At the start it ends here; later on, permissions may come back.
                    self.settled.set()
                self._closing.wait(pause)
                pause = min(2 * pause, RECONNECT_MAX)
            except SplitError as error:
                count_dropped(self._counters, error)
            except Exception:
                self._counters["failures"] += 1
                log.exception("the keeper of a Redis link failed, and goes on")
            self._take_inbox()
        self._leave()

    def _take_inbox(self) -> None:
        busy = self._wishes.waiting or (self._watching and self.role == "device")
        wait = WATCH_INTERVAL if busy else max(0.0, self._next_beat - time.monotonic())
        with contextlib.suppress(queue.Empty):
            item = self._inbox.get(timeout=0.0 if self._broken else wait)
            while True:
                if isinstance(item, headers.Relay):
                    self._undelivered.append(item)
                elif item is not None:
                    self._wishes.take(item)
                item = self._inbox.get_nowait()

    def _turn(self) -> None:
        now = time.monotonic()
        if self._broken or self._undelivered or now >= self._next_beat:
            self._next_beat = now + HEARTBEAT
            self._beat()
        if now >= self._next_watch:
            self._next_watch = now + (WATCH_INTERVAL if self.role == "device" else HEARTBEAT)
            self._watch()
        if self._undelivered:
            self._return_to_sender()
        self._wishes.answer(self.early)

    # --- heartbeats ----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        now = time.monotonic()
        self._announcement = self._caller.announcement() or self._announcement
        self._watching = set(self._announcement.watching)
        if self._announcement.leaving:
            # Until it says otherwise: it lives, but is of no use to those that watch it.
            self._withdraw()
            return
        keys = self._keys
        boot = ("SET", keys.boot, self._own_boot, "NX", "GET") if self.role == "worker" else ("GET", keys.boot)
        commands: list[Command] = [
            (self.lane, ("PEXPIRE", self.lane, int(LEASE * 1000))),
            (keys.boot, boot),
            roster.version_command(keys),
        ]
        existed, boot_found, roster_version, *_ = self._line.run_allowed([*commands, *self._registration()])
        if problem := failed(existed) or failed(boot_found):
            raise Refused(f"it is no Redis 7 or Valkey, or its keys are in use for something else: {problem}")
        self._lease_found(now, bool(existed), boot_found)
        self.failure = ""
        self.settled.set()
        if self.opens is not None:
            self._tend_opens(self.opens)
        self._compare_rosters(roster_version)

    def _registration(self) -> list[Command]:
        """What a worker with a service adds to its heartbeat."""
        if self.opens is None:
            return []
        member = self._fleet.roster().by_name(self._announcement.member)
        if member is None or member.revoked:
            self.room = 0
            return [(self._keys.workers, ("HDEL", self._keys.workers, self._announcement.sender.hex()))]
        self.room = self._announcement.room
        public = headers.encode_header(msgspec.structs.replace(self._announcement, watching=[]))
        return [
            (self._keys.workers, ("HSET", self._keys.workers, self._announcement.sender.hex(), public)),
            *((key, ("PEXPIRE", key, int(OPENS_LEASE * 1000))) for key in (self._keys.workers, self.opens)),
        ]

    def _lease_found(self, now: float, existed: bool, boot: bytes | None) -> None:
        """Tells the handler what a lost lease, a server without memory or a lost connection mean."""
        joined, absent = self.lanes_made > 0, now - self.heard
        self.heard = time.monotonic()
        if boot is None and self.role == "worker":
            boot = self._own_boot
        forgot = joined and boot is not None and self._boot not in (None, boot)
        self._boot = boot or self._boot
        if joined and self._broken:
            # Others may have been unable to renew their leases for as long.
            self._early_until = max(self._early_until, now + min(GRACE, absent + HEARTBEAT))
        if forgot:
            self._early_until = now + GRACE
        if not existed or self._spoiled:
            self._make_lane()
        broken, self._broken = self._broken, False
        self.lanes_made = max(self.lanes_made, 1)
        if not joined:
            return
        away, self._away = self._away or absent >= LEASE, False
        if not existed and not forgot and away:
            # Held for dead meanwhile: those that this peer watches have been told so, and hold nothing of it.
            self._caller.gone(list(self._watching))
        elif (broken or forgot or not existed) and now >= self._next_reset:
            # A server that changes its name all the time must not be sent everything again each time.
            self._next_reset = now + HEARTBEAT
            self._caller.reset()

    def _make_lane(self) -> None:
        """An empty lane under a lease: whoever adds to a lane that is not there is told so."""
        lane = self.lane
        commands = (
            ("MULTI",),
            ("DEL", lane),
            ("XADD", lane, "*", *entry(b"", b"")),
            ("XTRIM", lane, "MAXLEN", 0),
            ("PEXPIRE", lane, int(LEASE * 1000)),
            ("EXEC",),
        )
        self._line.run_allowed([(lane, words) for words in commands])
        self._spoiled = False
        self.lanes_made += 1

    def _withdraw(self) -> None:
        """Those that watch this peer need not wait for its lease to end."""
        commands: list[Command] = [(self.lane, ("DEL", self.lane))]
        if self.opens is not None:
            commands.append((self._keys.workers, ("HDEL", self._keys.workers, self._announcement.sender.hex())))
        self.room = 0
        self._line.run_allowed(commands)
        self._away, self._broken = True, False
        self.heard = time.monotonic()

    def _leave(self) -> None:
        for _ in range(2):
            try:
                self._withdraw()
                return
            except BrokerUnreachable as error:
                # A broken connection is made anew once.
                log.debug("left without a word: %s", error)

    def _compare_rosters(self, answer: object) -> None:
        self._fleet.refresh()
        there = roster.version_of(answer)
        if there > self._fleet.roster().version:
            roster.fetch(self._line, self._keys, self._fleet)
        elif there < self._fleet.roster().version and self.role == "worker":
            roster.put(self._line, self._keys, self._fleet)
        version = self._fleet.roster().version
        if version > self._roster_version:
            self._roster_version = version
            self._caller.roster()

    # --- those that this peer watches ------------------------------------------------------------------------

    def _watch(self) -> None:
        """Notices watched peers whose lease has ended, and lanes that are full."""
        watched = list(self._watching)
        sizes = lane_sizes(self._line, self._keys, self.other_role, watched)
        self.full = frozenset(peer for peer, size in sizes.items() if size > LANE_BYTES)
        gone = [peer for peer in watched if peer not in sizes]
        if gone and not self.early:
            self._watching.difference_update(gone)
            self._caller.gone(gone)

    def _return_to_sender(self) -> None:
        """After a heartbeat: it would have found out that the server is a new one."""
        back = lane_sizes(self._line, self._keys, self.other_role, {header.to for header in self._undelivered})
        undelivered, self._undelivered = self._undelivered, []
        for header in undelivered:
            if self.early or header.to in back:
                self.bounce(header, "full", "the server has just started", RETRY_AFTER)
            else:
                self.bounce(header, "gone", "the peer is not connected")

    def bounce(self, header: headers.Relay, reason: Any, detail: str, retry_after: float = 0.0) -> None:
        """Tells the sender that a message was not delivered."""
        self._counters[f"bounced_{reason}"] += 1
        bounce = headers.Bounce(
            reason, header.channel, header.session, header.seq, header.to, detail, retry_after, header.epoch
        )
        self._caller.message(bounce, b"")

    # --- wishes: the worker's side ---------------------------------------------------------------------------

    def _tend_opens(self, opens: str) -> None:
        """Takes over what a worker has read and not answered; drops what nobody waits for; forgets dead workers."""
        least = self._server_time - int(2 * OPEN_PATIENCE * 1000)
        claim = ("XAUTOCLAIM", opens, GROUP, self._announcement.member, int(HEARTBEAT * 1000), 0, "COUNT", 16)
        moment, _, claimed = self._line.run_allowed(
            [(opens, ("TIME",)), (opens, ("XTRIM", opens, "MINID", max(0, least))), (opens, claim)]
        )
        if failed(claimed):
            self.make_group(self._line)
        else:
            for id_, fields in claimed[1]:
                self._take_open(id_, fields)
        self._server_time = int(moment[0]) * 1000
        self._beats += 1
        if self._beats % CLEAN_UP == 0 and not self.early:
            announced, wrong = read_workers(self._line, self._keys, self._counters)
            alive = lane_sizes(self._line, self._keys, "worker", announced)
            dead = [peer.hex() for peer in announced if peer not in alive] + wrong
            if dead:
                self._line.run_allowed([(self._keys.workers, ("HDEL", self._keys.workers, *dead))])

    def make_group(self, line: Line, anew: bool = False) -> None:
        """The stream of the wishes for this worker's service, and the group that reads it."""
        assert self.opens is not None
        commands: list[Command] = [(self.opens, ("DEL", self.opens))] if anew else []
        commands.append((self.opens, ("XGROUP", "CREATE", self.opens, GROUP, "0", "MKSTREAM")))
        for answer in line.run(commands):
            failed(answer)
