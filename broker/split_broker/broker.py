"""The embedded ZeroMQ broker: one ROUTER socket, one thread, one poll loop.

Devices and workers connect to the same socket and announce themselves with every heartbeat. The broker routes by
peer: each has a lane, a bounded queue under a byte credit. A device that has no worker yet sends an `Open`, which
goes to the worker of that service with the most room, or waits a little for one. The broker reads headers only; the
bodies are sealed between device and worker. It keeps nothing that a restart would lose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from split_broker.lanes import Lane, Message, Peer, Waiting
from split_common import wire
from split_common.errors import ConfigError, Malformed, SplitError
from split_common.fleet import Fleet, check_address
from split_common.transport import HEARTBEAT, MISSED, parse_address

log = logging.getLogger(__name__)

#: Seconds between two probes of each worker's connection: a dead process is noticed by the next one.
PROBE_INTERVAL = 0.2

#: Seconds that a device's wish for a worker waits for room before it is told to try again.
OPEN_PATIENCE = 2.0

#: Wishes that may wait for a worker of one service.
OPEN_QUEUE = 4096

#: Seconds after its start during which the broker does not yet know who is alive.
GRACE = HEARTBEAT * MISSED


class Broker:
    """A broker bound to an address; `start` runs it in a thread of its own, `stop` ends it.

    Args:
        address: `tcp://HOST:PORT` (port `*` for a free one), `zmq://HOST:PORT` or `ipc://PATH`.
        fleet: whose members may connect. On TCP they prove it with CurveZMQ (RFC 26); an ipc socket is guarded by
            its directory's permissions.

    Raises:
        ConfigError: the address is malformed, in use, or not loopback though no keys are configured.
    """

    def __init__(self, address: str, fleet: Fleet) -> None:
        address = parse_address(address)
        check_address(address, fleet)
        self._fleet = fleet
        self._boot = os.urandom(8)
        self._started = time.monotonic()
        self._peers: dict[bytes, Peer] = {}
        self._routes: dict[bytes, bytes] = {}
        self._orphans: dict[bytes, tuple[Lane, float]] = {}
        self._opens: defaultdict[wire.Service, deque[Waiting]] = defaultdict(deque)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lambda-split-broker", daemon=True)
        #: Messages and bytes routed, and messages refused by reason.
        self.counters: Counter[str] = Counter()

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = wire.MAX_BODY
        self._socket.sndhwm = self._socket.rcvhwm = 256
        try:
            if address.startswith("tcp://"):
                self._secure()
            else:
                _private_directory(Path(address.removeprefix("ipc://")).parent)
            try:
                self._socket.bind(address)
            except zmq.ZMQError as error:
                raise ConfigError(f"cannot listen on {address}: {error}") from None
        except BaseException:
            self._release()
            raise
        #: Where it listens: the address with its real port.
        self.address = bytes(self._socket.last_endpoint).decode().rstrip("\0")  # type: ignore[arg-type]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop and frees the address. Peers find out by the missing heartbeats and reconnect."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._release()

    def _secure(self) -> None:
        self._auth = ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback("*", credentials_provider=self)
        _, secret = self._fleet.identity("broker").curve_z85()
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a CURVE key (Z85) may connect: ZAP's question (RFC 27)."""
        member = self._fleet.roster().by_curve_key(zmq.utils.z85.decode(key))
        accepted = member is not None and not member.revoked
        if not accepted:
            self.counters["refused_keys"] += 1
            log.warning("refused a connection: its key is not in the roster")
        return accepted

    def _release(self) -> None:
        self._socket.close()
        if self._auth is not None:
            self._auth.stop()
        self._context.term()

    # --- the loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            next_probe = 0.0
            while not self._closing.is_set():
                if self._socket.poll(50):
                    self._drain()
                now = time.monotonic()
                if now >= next_probe:
                    next_probe = now + PROBE_INTERVAL
                    self._housekeeping(now)
        finally:
            self._release()

    def _drain(self) -> None:
        for _ in range(256):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                if len(frames) != 3:
                    raise Malformed(f"{len(frames)} frames")
                self._handle(frames[0], frames[1].bytes, frames[2].bytes)
            except SplitError as error:
                self.counters[type(error).__name__] += 1
                log.warning("dropped a message: %s", error)

    def _handle(self, envelope: zmq.Frame, head: bytes, body: bytes) -> None:
        route = envelope.bytes
        header = wire.decode_header(head)
        if isinstance(header, wire.Announce):
            self._announced(header, route, self._member(envelope, header))
            return
        if not isinstance(header, wire.Relay | wire.Open | wire.RosterRequest):
            raise Malformed(f"a peer sent a broker's message: {type(header).__name__}")
        if self._routes.get(route) != header.sender:
            # A peer that this broker has not met yet: its announcement is on the way, and it sends again.
            self.counters["unannounced"] += 1
            return
        sender = self._peers[header.sender]
        match header:
            case wire.Relay():
                self._relay(sender, header, (head, body))
            case wire.Open():
                self._open(sender, header, (head, body))
            case wire.RosterRequest():
                self._put(sender, (wire.encode_header(wire.RosterReply()), self._fleet.roster_bytes()))

    def _relay(self, sender: Peer, header: wire.Relay, message: Message) -> None:
        target = self._peers.get(header.to)
        if target is not None:
            if target.role == sender.role:
                raise Malformed(f"a {sender.role} wrote to a {target.role}")
            if not self._put(target, message):
                self._bounce(sender, header, "full", "the queue of the worker is full", retry_after=0.5)
            elif log.isEnabledFor(logging.DEBUG):
                log.debug("routed %s", _describe(sender, target, header, message[1]))
        elif time.monotonic() - self._started < GRACE:
            lane, _ = self._orphans.setdefault(header.to, (Lane(), time.monotonic()))
            if not lane.put(message):
                self._bounce(sender, header, "full", "the broker has just started", retry_after=1.0)
        else:
            self._bounce(sender, header, "gone", "the peer is not connected")

    def _open(self, sender: Peer, header: wire.Open, message: Message) -> None:
        queue = self._opens[header.service]
        if len(queue) >= OPEN_QUEUE:
            self._bounce(sender, header, "busy", "too many devices wait for a worker", retry_after=OPEN_PATIENCE)
            return
        deadline = time.monotonic() + OPEN_PATIENCE
        queue.append(Waiting(message, sender.id, header.channel, frozenset(header.avoid), deadline))
        self._assign(header.service)

    def _assign(self, service: wire.Service) -> None:
        """Hands waiting opens to workers with room, the most room first."""
        queue = self._opens[service]
        workers = [peer for peer in self._peers.values() if peer.service == service]
        for wish in list(queue):
            able = [worker for worker in workers if worker.room > 0 and worker.id not in wish.avoid]
            if able:
                worker = max(able, key=lambda peer: peer.room)
                if self._put(worker, wish.message):
                    worker.room -= 1
                    queue.remove(wish)
        if not queue:
            del self._opens[service]

    def _announced(self, header: wire.Announce, route: bytes, member: str) -> None:
        peer = self._peers.get(header.sender)
        if peer is None:
            peer = self._peers[header.sender] = Peer(header.sender, route, header.role, member)
            self._routes[route] = peer.id
            if orphan := self._orphans.pop(peer.id, None):
                peer.lane = orphan[0]
            log.info("%s %s joined", header.role, member)
        elif (peer.member, peer.role) != (member, header.role):
            raise Malformed("an announcement under another peer's id")
        elif peer.route != route:
            self._routes.pop(peer.route, None)
            self._routes[route] = peer.id
            peer.route = route
            peer.lane.reconnected()
        if header.leaving:
            self._remove(peer, "left")
            return
        peer.seen = time.monotonic()
        peer.lane.credit(header.received)
        peer.watching = frozenset(header.watching)
        peer.service, peer.model, peer.room = header.service, header.model, header.room
        if peer.service is not None and peer.service in self._opens:
            self._assign(peer.service)
        known = self._peers.keys()
        early = time.monotonic() - self._started < GRACE
        gone = [] if early else [id_ for id_ in header.watching if id_ not in known]
        self._put(peer, self._welcome(gone))
        self._flush(peer)

    def _member(self, envelope: zmq.Frame, header: wire.Announce) -> str:
        """The name under which a peer is authenticated: by its CURVE key, or on ipc its own word."""
        if self._auth is None:
            member = self._fleet.roster().by_name(header.member)
        else:
            member = self._fleet.roster().by_curve_key(zmq.utils.z85.decode(str(envelope.get("User-Id"))))
        if member is None or member.revoked or member.role != header.role or member.name != header.member:
            raise Malformed("an announcement that its sender's key does not allow")
        return member.name

    # --- delivery and death --------------------------------------------------------------------------------

    def _put(self, peer: Peer, message: Message) -> bool:
        if not peer.lane.put(message):
            return False
        self._flush(peer)
        return True

    def _flush(self, peer: Peer) -> None:
        while peer.id in self._peers and (message := peer.lane.take()) is not None:
            try:
                self._socket.send_multipart([peer.route, *message], zmq.NOBLOCK, copy=len(message[1]) < 65536)
                self.counters["messages_routed"] += 1
                self.counters["bytes_routed"] += len(message[0]) + len(message[1])
            except zmq.Again:
                peer.lane.put_back(message)
                return
            except zmq.ZMQError:
                self._lost_route(peer, message)
                return

    def _lost_route(self, peer: Peer, message: Message) -> None:
        """A worker's closed connection is its death; a device's is a network's, until its heartbeats end."""
        peer.lane.put_back(message)
        if peer.role == "worker":
            self._remove(peer, "lost its connection")

    def _remove(self, peer: Peer, why: str) -> None:
        log.info("%s %s %s", peer.role, peer.member, why)
        self.counters[f"{peer.role}s_gone"] += 1
        del self._peers[peer.id]
        self._routes.pop(peer.route, None)
        for watcher in [other for other in self._peers.values() if peer.id in other.watching]:
            self._put(watcher, self._welcome([peer.id]))

    def _welcome(self, gone: list[bytes]) -> Message:
        return wire.encode_header(wire.Welcome(self._boot, self._fleet.roster().version, gone)), b""

    def _bounce(
        self, to: Peer, header: wire.Relay | wire.Open, reason: Any, detail: str, retry_after: float = 0.0
    ) -> None:
        self.counters[f"bounced_{reason}"] += 1
        session, seq = (header.session, header.seq) if isinstance(header, wire.Relay) else (0, 0)
        target = header.to if isinstance(header, wire.Relay) else bytes(8)
        bounce = wire.Bounce(reason, header.channel, session, seq, target, detail, retry_after)
        self._put(to, (wire.encode_header(bounce), b""))

    def _housekeeping(self, now: float) -> None:
        if self._fleet.refresh():
            log.info("roster version %d", self._fleet.roster().version)
            self._enforce_roster()
        probe = wire.encode_header(wire.Probe()), b""
        for peer in list(self._peers.values()):
            if now - peer.seen > HEARTBEAT * MISSED:
                self._remove(peer, "fell silent")
            elif peer.role == "worker":
                self._put(peer, probe)
            else:
                self._flush(peer)
        self._expire_opens(now)
        for id_, (_, since) in list(self._orphans.items()):
            if now - since > GRACE:
                del self._orphans[id_]

    def _expire_opens(self, now: float) -> None:
        for service in list(self._opens):
            served = any(peer.service == service for peer in self._peers.values())
            early = now - self._started < GRACE
            for wish in list(self._opens[service]):
                if now < wish.deadline and (served or early):
                    continue
                self._opens[service].remove(wish)
                if (sender := self._peers.get(wish.sender)) is None:
                    continue
                header = wire.Open(wish.sender, wish.channel, service)
                if served:
                    self._bounce(sender, header, "busy", "every worker is full", retry_after=1.0)
                else:
                    self._bounce(sender, header, "no-worker", self._served_models())
            if not self._opens[service]:
                del self._opens[service]

    def _served_models(self) -> str:
        services = {(p.model, p.service.first, p.service.last) for p in self._peers.values() if p.service}
        return ", ".join(f"{model} layers {first}:{last}" for model, first, last in sorted(services))

    def _enforce_roster(self) -> None:
        for peer in list(self._peers.values()):
            member = self._fleet.roster().by_name(peer.member)
            if member is None or member.revoked:
                self._remove(peer, "was revoked")
            else:
                self._put(peer, self._welcome([]))


def _describe(sender: Peer, target: Peer, header: wire.Relay, body: bytes) -> str:
    """All that the broker can know of a message."""
    return (
        f"{header.kind.name} {sender.member} -> {target.member}: channel {header.channel}, "
        f"session {header.session}, seq {header.seq}, {len(body)} bytes {body[:16].hex()}…"
    )


def _private_directory(directory: Path) -> None:
    """Makes the directory of an ipc socket, or checks that nobody else may enter it."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(parents=True, mode=0o700)
    if stat.S_IMODE(directory.stat().st_mode) & 0o077:
        raise ConfigError(f"{directory} is open to other users: `chmod 700` it, or bind to a directory of your own")
