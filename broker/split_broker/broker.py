"""The embedded ZeroMQ broker: one ROUTER socket, one thread, one loop.

Devices and workers connect to the same socket and announce themselves with every heartbeat. The broker routes by
peer: each has a bounded queue under a byte credit (`delivery`). A device without a worker sends an `Open`, which is
given to one (`opens`). The broker reads headers only: bodies are sealed between device and worker. It keeps nothing
that a restart would lose.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter

import zmq

from split_broker.connections import REVOKED_LIFETIME
from split_broker.delivery import Delivery
from split_broker.memory import MEMORY_LIMIT
from split_broker.opens import TOO_OFTEN, Opens
from split_broker.peer_queue import BodyBytes, Peer, RoutedMessage, described
from split_broker.quotas import (
    ANNOUNCEMENTS,
    LONG_HEADER,
    LONG_HEADERS,
    OPENS,
    ROSTER_REQUESTS,
    STRANGERS_WATCHED,
    TOO_OFTENS,
    UNANNOUNCED,
    Rate,
    Rates,
)
from split_broker.router import Router
from split_common.errors import CertificateError, ConfigError, Malformed, Oversized
from split_common.protocol import headers
from split_common.protocol.handshake import MAX_HANDSHAKE
from split_common.transport.address import is_redis, parse_address
from split_common.transport.base import GRACE, HEARTBEAT, MISSED
from split_common.transport.links import check_address
from split_common.transport.placement import GONE, full
from split_common.transport.supervised import Supervisor
from split_common.trust.fleet import Fleet

log = logging.getLogger(__name__)

#: Seconds between two probes of each worker's connection: the next probe notices a dead process.
PROBE_INTERVAL = 0.2

#: Seconds between two attempts to send to peers whose socket was full.
FLUSH_INTERVAL = 0.005

#: Seconds between two announcements of a worker of which each gives it opens. Others wait for the next probe.
PLACE_INTERVAL = 0.05

#: Longest time, in seconds, that the loop waits for a message before it does what else is due.
IDLE = 0.05

#: What an announced peer may send.
_FROM_PEERS = headers.Relay, headers.Open, headers.RosterRequest


class Broker:
    """A broker, bound to an address. `start` runs its loop on a thread; `stop` ends it.

    Args:
        address: `tcp://HOST:PORT` (port `*` for a free one), `zmq://HOST:PORT` or `ipc://PATH`.
        fleet: its members may connect (`split_broker.access`).
        memory_limit: resident memory of this process, in bytes, above which connections end
            (`split_broker.memory`); None if the process is not the broker's alone. Messages that wait have half of
            it, or of `MEMORY_LIMIT`.

    Raises:
        ConfigError: the address is malformed, in use, or not loopback though no keys are configured.
        KeysError: the broker's key is not here.
    """

    def __init__(self, address: str, fleet: Fleet, memory_limit: int | None = None) -> None:
        address = parse_address(address)
        if is_redis(address):
            raise ConfigError("with Redis there is no broker: give devices and workers the address of the server")
        check_address(address, fleet)
        self._fleet = fleet
        self._started = time.monotonic()
        self._enforced = fleet.roster().version
        self._rates = Rates()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lambda-split-broker", daemon=True)
        #: Messages and bytes routed; messages refused by reason, and dropped by type of error.
        self.counters: Counter[str] = Counter()
        self._supervisor = Supervisor("the broker's loop", self.counters, self._closing, pause=0.0)

        capacity = (memory_limit or MEMORY_LIMIT) // 2
        self._router = Router(
            address, fleet, self.counters, IDLE, memory_limit, lambda connection: self._delivery.queued(connection)
        )
        self._delivery = Delivery(self._router, fleet, self.counters, capacity, self._gone)
        self._peers, self._routes = self._delivery.peers, self._delivery.routes
        self._authentication = self._router.authentication
        self._opens = Opens(self._delivery, self._authentication.turned_away)
        #: The address, with the real port in place of `*`.
        self.address = self._router.address

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop and frees the address. Peers notice the missing answers, and reconnect."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._router.close()

    # --- the loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_flush, next_probe = 0.0, time.monotonic()
        try:
            while not self._closing.is_set():
                # ROUTER does not signal when a full connection takes messages again.
                blocked = self._delivery.blocked
                if (frames := self._router.receive(FLUSH_INTERVAL if blocked else None)) is not None:
                    self._supervisor.run(self._take, frames)
                now = time.monotonic()
                if blocked and now >= next_flush:
                    for peer in [self._peers[id_] for id_ in blocked]:
                        self._supervisor.run(self._delivery.flush, peer)
                    # However many are blocked, half of the time is left for messages.
                    ended = time.monotonic()
                    next_flush = ended + max(FLUSH_INTERVAL, ended - now)
                if now >= next_probe:
                    if now - next_probe > HEARTBEAT:
                        self._excuse(now - next_probe)
                    next_probe = now + PROBE_INTERVAL
                    self._supervisor.run(self._housekeeping, now)
        finally:
            self._router.close()

    def _excuse(self, held_up: float) -> None:
        """Extends all peers' deadlines by the time the broker itself stalled: their heartbeats are still queued."""
        for peer in self._peers.values():
            peer.seen += held_up
        self._router.connections.excuse(held_up)

    def _take(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 3:
            raise Malformed("a message that is not two frames")
        self._handle(frames[0], frames[1].bytes, headers.check_body(frames[2]))
        self._delivery.tell_gave_way()

    def _handle(self, envelope: zmq.Frame, head: bytes, body: BodyBytes) -> None:
        route = envelope.bytes
        known = self._peers.get(self._routes.get(route, b""))
        if len(head) > LONG_HEADER:
            # Also before anybody is announced: a member whose heartbeats are not admitted goes on sending them.
            member = known.member if known else self._authentication.owner(envelope)
            if not self._admits(member, LONG_HEADERS, len(head)):
                return
        header = headers.decode_header(head)
        if isinstance(header, headers.Announce):
            member = self._authentication.member(envelope, header)
            if self._admits(member, ANNOUNCEMENTS, self._weight(header)):
                self._announced(header, route, member, self._certified(header, route, body))
            return
        if not isinstance(header, _FROM_PEERS):
            raise Malformed(f"a peer sent a broker's message: {type(header).__name__}")
        if self._routes.get(route) != header.sender:
            # The peer has not announced itself to this broker yet, or uses another peer's id. The welcome says that
            # this broker is new, so the peer announces itself and sends again what was dropped.
            self.counters["unannounced"] += 1
            if not self._admits(self._authentication.owner(envelope), UNANNOUNCED):
                return
            with contextlib.suppress(zmq.ZMQError):
                self._router.send(route, self._delivery.welcome([]))
            return
        sender = self._peers[header.sender]
        match header:
            case headers.Relay():
                self._relay(sender, header, (head, body))
            case headers.Open():
                if self._admits_open(sender, header, body):
                    self._opens.ask(sender, header, (head, body), time.monotonic(), self._early)
            case headers.RosterRequest():
                if self._admits(sender.member, ROSTER_REQUESTS):
                    self._delivery.put(sender, self._delivery.roster())

    def _relay(self, sender: Peer, header: headers.Relay, message: RoutedMessage) -> None:
        target = self._peers.get(header.to)
        if target is not None and target.role == sender.role:
            raise Malformed(f"a {sender.role} wrote to a {target.role}")
        if target is not None and sender.role == "device":
            self._opens.set_ups.sent(sender, target, header, time.monotonic())
        if target is not None and self._delivery.put(target, message, sender.member):
            if log.isEnabledFor(logging.DEBUG):
                log.debug("routed %s", described(sender, target, header, message[1]))
        elif header.to in self._peers:
            self._delivery.refuse(sender, header, full("the queue of the worker is full"))
        elif self._early:
            self._delivery.refuse(sender, header, full("the broker has just started"))
        else:
            self._delivery.refuse(sender, header, GONE)

    @property
    def _early(self) -> bool:
        """Whether peers that are alive may not have announced themselves to this broker yet."""
        return time.monotonic() - self._started < GRACE

    # --- shares of members -----------------------------------------------------------------------------------

    def _admits(self, member: str, rate: Rate, weight: float = 1.0) -> bool:
        """Whether a member may send one more message of a kind, which counts as `weight` of them."""
        admitted = self._rates.admits(member, rate, weight)
        self.counters["too_often"] += not admitted
        return admitted

    def _weight(self, header: headers.Announce) -> float:
        """As how many heartbeats one counts: its answer names each watched peer that is not there.

        If it says that the peer leaves, all that watch this one are told.
        """
        known = len(header.watching) if self._early else sum(map(self._peers.__contains__, header.watching))
        strangers = len(header.watching) - known
        watchers = sum(header.sender in peer.watching for peer in self._peers.values()) if header.leaving else 0
        return 1.0 + (strangers + watchers) / STRANGERS_WATCHED

    def _admits_open(self, sender: Peer, header: headers.Open, body: BodyBytes) -> bool:
        """Whether a device's open may be pending. If not, the device is told, unless it asks far too often."""
        if sender.role != "device":
            raise Malformed(f"a {sender.role} asked for a worker")
        if len(body) > MAX_HANDSHAKE:
            raise Oversized(f"a hello of {len(body)} bytes (at most {MAX_HANDSHAKE})")
        if not self._admits(sender.member, OPENS):
            if self._admits(sender.member, TOO_OFTENS):
                self._delivery.refuse(sender, header, TOO_OFTEN)
            return False
        return self._opens.make_room(sender, header)

    # --- announcements -------------------------------------------------------------------------------------

    def _certified(self, header: headers.Announce, route: bytes, body: BodyBytes) -> bool:
        """Whether an announcement shows a certificate. A peer whose certificate does not hold is taken out.

        Raises:
            CertificateError, Malformed: as `Authentication.certify`.
        """
        try:
            return self._authentication.certify(header, memoryview(body))  # type: ignore[arg-type]
        except CertificateError:
            peer = self._peers.get(header.sender)
            if peer is not None and self._routes.get(route) == peer.id:
                self._delivery.remove(peer, "was put out")
            # The supervisor says why: not each time, however often a member comes back.
            raise

    def _announced(self, header: headers.Announce, route: bytes, member: str, certified: bool = False) -> None:
        peer = self._peers.get(header.sender)
        if self._routes.get(route, header.sender) != header.sender:
            raise Malformed("a second peer on one connection")
        gone: list[bytes] = []
        if peer is None and header.leaving:
            self._router.connections.left(route)
            return
        if peer is None:
            peer = self._delivery.add(header, route, member)
            # It may have counted as dead: the peers that it watches were told so, and have dropped its sessions.
            if not self._early:
                gone = header.watching
        elif (peer.member, peer.role) != (member, header.role):
            raise Malformed("an announcement under another peer's id")
        elif peer.route != route:
            self._delivery.move(peer, route)
        if header.leaving:
            self._delivery.remove(peer, "left")
            return
        peer.seen = time.monotonic()
        self._router.connections.announced(route, member)
        peer.queue.credit(header.received, self._router.connections.unsent(route))
        peer.watching = frozenset(header.watching)
        if peer.role == "worker":
            peer.service, peer.model, peer.room = header.service, header.model, header.room
            peer.certified = certified
        else:
            self._opens.vouched(header.answered)
        if not self._early:
            gone = gone or [id_ for id_ in header.watching if id_ not in self._peers]
        self._delivery.put(peer, self._delivery.welcome(gone))
        self._delivery.flush(peer)
        if peer.service is not None and peer.room and peer.seen - peer.placed > PLACE_INTERVAL:
            peer.placed = peer.seen
            self._opens.place(peer.seen, self._early, peer.service)

    # --- housekeeping --------------------------------------------------------------------------------------

    def _gone(self, peer: Peer) -> None:
        """Forgets what it knows of a peer that was taken out."""
        self._opens.forget(peer.id)

    def _housekeeping(self, now: float) -> None:
        if self._fleet.refresh():
            log.info("roster version %d", self._fleet.roster().version)
        if self._fleet.roster().version > self._enforced:
            self._enforced = self._fleet.roster().version
            self._enforce_roster()
        probe = headers.encode_header(headers.Probe()), b""
        for peer in list(self._peers.values()):
            if now - self._router.connections.last_sign(peer.route, peer.seen, now) > HEARTBEAT * MISSED:
                self._delivery.remove(peer, "fell silent")
            elif peer.role == "worker":
                # Not through its queue, which may be waiting for credit.
                self._delivery.send(peer, probe)
        self._opens.place(now, self._early)
        self._delivery.tell_gave_way()
        self._router.look(now)

    def _enforce_roster(self) -> None:
        for peer in list(self._peers.values()):
            member = self._fleet.roster().by_name(peer.member)
            if member is None or member.revoked:
                # The roster tells it why. Until its connection ends, nothing that it sends is accepted.
                self._delivery.put(peer, self._delivery.roster())
                self._delivery.remove(peer, "was revoked")
                self._router.connections.left(peer.route, REVOKED_LIFETIME)
            else:
                self._delivery.put(peer, self._delivery.welcome([]))
