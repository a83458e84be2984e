"""What the ZeroMQ broker does for a peer, done by the peer itself: who lives, who serves what, which roster counts.

The keeper's thread renews the lease on the peer's own lane, looks after the leases of those that the peer watches,
keeps a worker's announcement where devices find it, and answers a device's wish for a worker.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from split_common import redis_roster, wire
from split_common.errors import BrokerUnreachable, Malformed, SplitError
from split_common.fleet import Fleet
from split_common.keys import Role
from split_common.redis_keys import GROUP, Keys, entry
from split_common.redis_server import Command, Line, Refused, failed
from split_common.transport import GRACE, HEARTBEAT, MISSED, OPEN_PATIENCE, Handler, count_dropped

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

#: Heartbeats between two clean-ups of the list of workers.
CLEAN_UP = 10


class Caller:
    """Calls a peer's handler from several threads, one at a time; what it raises is counted."""

    def __init__(self, handler: Handler, counters: Counter[str]) -> None:
        self._handler = handler
        self._counters = counters
        self._lock = threading.Lock()

    def message(self, header: wire.AnyHeader, body: bytes) -> None:
        self._call(lambda: self._handler.on_message(header, body))

    def gone(self, peers: Iterable[bytes]) -> None:
        self._call(lambda: self._handler.on_gone(peers))

    def reset(self) -> None:
        self._call(self._handler.on_reset)

    def roster(self) -> None:
        self._call(self._handler.on_roster)

    def announcement(self) -> wire.Announce | None:
        """None when the handler failed."""
        announcements: list[wire.Announce] = []
        self._call(lambda: announcements.append(self._handler.announcement()))
        return announcements[0] if announcements else None

    def _call(self, call: Callable[[], None]) -> None:
        try:
            with self._lock:
                call()
        except SplitError as error:
            count_dropped(self._counters, error)
        except Exception:
            self._counters["HandlerError"] += 1
            log.exception("a message handler failed")


@dataclass
class Wish:
    """A device's wish for a worker."""

    header: wire.Open
    body: bytes
    #: Whether it waits in the stream that all workers of the service read.
    placed: bool = False
    deadline: float = field(default_factory=lambda: time.monotonic() + OPEN_PATIENCE)


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
        first: wire.Announce,
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
        self._inbox: queue.SimpleQueue[Wish | None] = queue.SimpleQueue()
        self._wish: Wish | None = None
        self._watching: set[bytes] = set()
        self._own_boot = os.urandom(8)
        self._boot: bytes | None = None
        self._broken = False
        self._spoiled = False
        self._early_until = 0.0
        self._next_beat = self._next_watch = self._next_reset = 0.0
        self._beats = 0
        self._server_time = 0
        self._roster_version = fleet.roster().version

    @property
    def early(self) -> bool:
        """Whether peers that are alive may not have made their lanes anew yet."""
        return time.monotonic() < self._early_until

    def wish(self, header: wire.Open, body: bytes) -> None:
        self._inbox.put(Wish(header, body))

    def announce(self) -> None:
        self._next_beat = 0.0
        self._inbox.put(None)

    def answered(self, channel: int) -> None:
        """A worker has answered the wish for this channel."""
        wish = self._wish
        if wish is not None and wish.header.channel == channel:
            self._wish = None

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
        busy = self._wish is not None or (self._watching and self.role == "device")
        wait = WATCH_INTERVAL if busy else max(0.0, self._next_beat - time.monotonic())
        try:
            item = self._inbox.get(timeout=0.0 if self._broken else wait)
        except queue.Empty:
            return
        if item is not None and (self._wish is None or self._wish.header.channel != item.header.channel):
            self._wish = item

    def _turn(self) -> None:
        now = time.monotonic()
        if self._broken or now >= self._next_beat:
            self._next_beat = now + HEARTBEAT
            self._beat()
        if now >= self._next_watch:
            self._next_watch = now + (WATCH_INTERVAL if self.role == "device" else HEARTBEAT)
            self._watch()
        if self._wish is not None:
            self._answer_wish(self._wish)

    def _run(self, commands: list[Command]) -> list[Any]:
        """Runs commands; a missing permission raises Refused."""
        answers = self._line.run(commands)
        for answer in answers:
            failed(answer)
        return answers

    # --- heartbeats ----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        now = time.monotonic()
        self._announcement = self._caller.announcement() or self._announcement
        self._watching = set(self._announcement.watching)
        keys = self._keys
        boot = ("SET", keys.boot, self._own_boot, "NX", "GET") if self.role == "worker" else ("GET", keys.boot)
        commands: list[Command] = [
            (self.lane, ("PEXPIRE", self.lane, int(LEASE * 1000))),
            (keys.boot, boot),
            redis_roster.version_command(keys),
        ]
        existed, boot_found, roster_version, *_ = self._run([*commands, *self._registration()])
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
        self.room = self._announcement.room
        public = wire.encode_header(msgspec.structs.replace(self._announcement, watching=[]))
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
        if not existed and not forgot and absent >= LEASE:
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
        self._run([(lane, words) for words in commands])
        self._spoiled = False
        self.lanes_made += 1

    def _leave(self) -> None:
        """Those that watch this peer need not wait for its lease to end."""
        commands: list[Command] = [(self.lane, ("DEL", self.lane))]
        if self.opens is not None:
            commands.append((self._keys.workers, ("HDEL", self._keys.workers, self._announcement.sender.hex())))
        try:
            self._line.run(commands)
        except BrokerUnreachable as error:
            log.debug("left without a word: %s", error)

    def _compare_rosters(self, answer: object) -> None:
        self._fleet.refresh()
        there = redis_roster.version_of(answer)
        if there > self._fleet.roster().version:
            redis_roster.fetch(self._line, self._keys, self._fleet)
        elif there < self._fleet.roster().version and self.role == "worker":
            redis_roster.put(self._line, self._keys, self._fleet)
        version = self._fleet.roster().version
        if version > self._roster_version:
            self._roster_version = version
            self._caller.roster()

    # --- those that this peer watches ------------------------------------------------------------------------

    def _watch(self) -> None:
        """Notices watched peers whose lease has ended, and lanes that are full."""
        watched = list(self._watching)
        sizes = self._lane_sizes(self.other_role, watched)
        self.full = frozenset(peer for peer, size in sizes.items() if size > LANE_BYTES)
        gone = [peer for peer in watched if peer not in sizes]
        if gone and not self.early:
            self._watching.difference_update(gone)
            self._caller.gone(gone)

    def _lane_sizes(self, role: Role, peers: Iterable[bytes]) -> dict[bytes, int]:
        """Bytes in the lanes of those of the peers that are alive."""
        peers = list(peers)
        lanes = [self._keys.lane(role, peer) for peer in peers]
        answers = self._run([(lane, ("MEMORY", "USAGE", lane)) for lane in lanes])
        return {peer: size for peer, size in zip(peers, answers, strict=True) if isinstance(size, int)}

    def _workers(self) -> list[wire.Announce]:
        """The announcements of all workers that are alive."""
        announced, _ = self._registry()
        alive = self._lane_sizes("worker", announced)
        return [worker for peer, worker in announced.items() if peer in alive]

    def _registry(self) -> tuple[dict[bytes, wire.Announce], list[bytes]]:
        """The list of workers, and the fields of it that are none."""
        (flat,) = self._run([(self._keys.workers, ("HGETALL", self._keys.workers))])
        if failed(flat):
            raise Malformed("the list of workers is no hash")
        announced, wrong = {}, []
        for name, value in zip(flat[::2], flat[1::2], strict=True):
            try:
                header = wire.decode_header(value)
                if not isinstance(header, wire.Announce) or header.sender.hex().encode() != name:
                    raise Malformed("an announcement of another peer")
                announced[header.sender] = header
            except SplitError as error:
                wrong.append(name)
                count_dropped(self._counters, error)
        return announced, wrong

    # --- wishes: the worker's side ---------------------------------------------------------------------------

    def _tend_opens(self, opens: str) -> None:
        """Takes over what a worker has read and not answered; drops what nobody waits for; forgets dead workers."""
        least = self._server_time - int(2 * OPEN_PATIENCE * 1000)
        claim = ("XAUTOCLAIM", opens, GROUP, self._announcement.member, int(HEARTBEAT * 1000), 0, "COUNT", 16)
        moment, _, claimed = self._run(
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
            announced, wrong = self._registry()
            alive = self._lane_sizes("worker", announced)
            dead = [peer.hex() for peer in announced if peer not in alive] + wrong
            if dead:
                self._run([(self._keys.workers, ("HDEL", self._keys.workers, *dead))])

    def make_group(self, line: Line, anew: bool = False) -> None:
        """The stream of the wishes for this worker's service, and the group that reads it."""
        assert self.opens is not None
        commands: list[Command] = [(self.opens, ("DEL", self.opens))] if anew else []
        commands.append((self.opens, ("XGROUP", "CREATE", self.opens, GROUP, "0", "MKSTREAM")))
        for answer in line.run(commands):
            failed(answer)

    # --- wishes: the device's side ---------------------------------------------------------------------------

    def _answer_wish(self, wish: Wish) -> None:
        """Hands a wish to the workers of its service, or tells the device that it cannot be met, or not soon."""
        header = wish.header
        workers = [worker for worker in self._workers() if worker.service == header.service]
        able = [worker for worker in workers if worker.room > 0 and worker.sender not in header.avoid]
        if not workers and not self.early:
            self._bounce(wish, "no-worker", self._served(), 0.0)
        elif workers and all(worker.sender in header.avoid for worker in workers) and not self.early:
            self._bounce(wish, "busy", "every worker is full", 1.0)
        elif wish.placed and not self._waits(wish):
            self._done(wish)
        elif not wish.placed and able:
            self._place(wish, able)
        elif workers and time.monotonic() > wish.deadline:
            self._bounce(wish, "busy", "every worker is full", 1.0)

    def _place(self, wish: Wish, able: list[wire.Announce]) -> None:
        message = entry(wire.encode_header(wish.header), wish.body)
        if wish.header.avoid:
            # Not to all workers: one that is to be avoided would have to pass it on.
            roomiest = max(able, key=lambda worker: worker.room)
            lane = self._keys.lane("worker", roomiest.sender)
            (id_,) = self._run([(lane, ("XADD", lane, "NOMKSTREAM", "*", *message))])
            if isinstance(id_, bytes):
                self._done(wish)
        else:
            opens = self._keys.opens(wish.header.service)
            (id_,) = self._run([(opens, ("XADD", opens, "NOMKSTREAM", "*", *message))])
            wish.placed = isinstance(id_, bytes)

    def _waits(self, wish: Wish) -> bool:
        """Whether a wish may still be in the stream; workers take from it what they read."""
        opens = self._keys.opens(wish.header.service)
        (length,) = self._run([(opens, ("XLEN", opens))])
        return isinstance(length, int) and length > 0

    def _served(self) -> str:
        services = {(worker.model, worker.service) for worker in self._workers()}
        names = {f"{model} layers {service.first}:{service.last}" for model, service in services if service}
        return ", ".join(sorted(names)) or "none"

    def _bounce(self, wish: Wish, reason: Any, detail: str, retry_after: float) -> None:
        self._done(wish)
        self._counters[f"bounced_{reason}"] += 1
        bounce = wire.Bounce(reason, wish.header.channel, detail=detail[:4096], retry_after=retry_after)
        self._caller.message(bounce, b"")

    def _done(self, wish: Wish) -> None:
        if self._wish is wish:
            self._wish = None
