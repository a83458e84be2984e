"""The embedded ZeroMQ broker: one ROUTER socket, one thread, one loop.

Devices and workers connect to the same socket and announce themselves with every heartbeat. The broker routes by
peer: each has a lane, a bounded queue under a byte credit. A device that has no worker yet sends an `Open`, which
goes to the worker of that service with the most room, or waits a little for one. The broker reads headers only; the
bodies are sealed between device and worker. It keeps nothing that a restart would lose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from split_broker.lanes import Body, Message, Peer, Waiting
from split_common import headers
from split_common.address import is_redis, parse_address
from split_common.errors import AuthenticationError, ConfigError, Malformed, SplitError
from split_common.fleet import Fleet, check_address
from split_common.transport import GRACE, HEARTBEAT, MISSED, OPEN_PATIENCE, count_dropped
from split_common.transport.zmq_link import receive_frames, send_frames

log = logging.getLogger(__name__)

#: Seconds between two probes of each worker's connection: a dead process is noticed by the next one.
PROBE_INTERVAL = 0.2

#: Seconds between two attempts to send to peers whose socket was full.
FLUSH_INTERVAL = 0.005

#: Seconds that the loop waits for a message before it looks after other things.
IDLE = 0.05

#: What an announced peer may send.
_FROM_PEERS = headers.Relay, headers.Open, headers.RosterRequest

_T = TypeVar("_T")


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
        if is_redis(address):
            raise ConfigError("with Redis there is no broker: give devices and workers the address of the server")
        check_address(address, fleet)
        self._fleet = fleet
        self._boot = os.urandom(8)
        self._started = time.monotonic()
        self._enforced = fleet.roster().version
        self._peers: dict[bytes, Peer] = {}
        self._routes: dict[bytes, bytes] = {}
        # Peers whose socket takes no more just now.
        self._blocked: set[bytes] = set()
        # By device, the oldest first: each has one wish at a time.
        self._wishes: dict[bytes, Waiting] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lambda-split-broker", daemon=True)
        #: Messages and bytes routed, and messages refused by reason.
        self.counters: Counter[str] = Counter()

        self._path: Path | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = headers.MAX_FRAME
        self._socket.ipv6 = "[" in address
        self._socket.sndhwm = self._socket.rcvhwm = 256
        self._socket.rcvtimeo = int(1000 * IDLE)
        try:
            if address.startswith("tcp://"):
                self._secure()
            else:
                _claim(Path(address.removeprefix("ipc://")))
            try:
                self._socket.bind(address)
            except zmq.ZMQError as error:
                raise ConfigError(f"cannot listen on {address}: {error}") from None
        except BaseException:
            self._release()
            raise
        if address.startswith("ipc://"):
            self._path = Path(address.removeprefix("ipc://"))
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
            count_dropped(self.counters, AuthenticationError("a connection whose key is not in the roster"))
        return accepted

    def _release(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._socket.close()
        if self._auth is not None:
            self._auth.stop()
        self._context.term()

    # --- the loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_flush, next_probe = 0.0, time.monotonic()
        try:
            while not self._closing.is_set():
                if (frames := self._receive()) is not None:
                    self._contained(self._take, frames)
                now = time.monotonic()
                if self._blocked and now >= next_flush:
                    next_flush = now + FLUSH_INTERVAL
                    for peer in [self._peers[id_] for id_ in self._blocked]:
                        self._contained(self._flush, peer)
                if now >= next_probe:
                    if now - next_probe > HEARTBEAT:
                        self._excuse(now - next_probe)
                    next_probe = now + PROBE_INTERVAL
                    self._contained(self._housekeeping, now)
        finally:
            self._release()

    def _excuse(self, held_up: float) -> None:
        """Nobody was silent while the broker itself was held up: what peers said meanwhile waits to be read."""
        for peer in self._peers.values():
            peer.seen += held_up

    def _receive(self) -> list[zmq.Frame] | None:
        """The next message; None when none comes for a while."""
        try:
            # A full socket says nothing when it takes messages again.
            if self._blocked and not self._socket.poll(int(1000 * FLUSH_INTERVAL)):
                return None
            return receive_frames(self._socket)
        except zmq.Again:
            return None

    def _contained(self, act: Callable[[_T], None], argument: _T) -> None:
        """Does something; whatever a message or a peer brings about by it ends here, and is counted."""
        try:
            act(argument)
        except SplitError as error:
            count_dropped(self.counters, error)
        except Exception:
            self.counters["failures"] += 1
            log.exception("the broker's loop failed, and goes on")

    def _take(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 3:
            raise Malformed(f"{len(frames)} frames")
        self._handle(frames[0], frames[1].bytes, headers.check_body(frames[2]))

    def _handle(self, envelope: zmq.Frame, head: bytes, body: Body) -> None:
        route = envelope.bytes
        header = headers.decode_header(head)
        if isinstance(header, headers.Announce):
            self._announced(header, route, self._member(envelope, header))
            return
        if not isinstance(header, _FROM_PEERS):
            raise Malformed(f"a peer sent a broker's message: {type(header).__name__}")
        if self._routes.get(route) != header.sender:
            # A peer that this broker has not met yet, or another's id. The welcome tells that this is a new broker;
            # what was dropped is sent again.
            self.counters["unannounced"] += 1
            with contextlib.suppress(zmq.ZMQError):
                send_frames(self._socket, route, *self._welcome([]))
            return
        sender = self._peers[header.sender]
        match header:
            case headers.Relay():
                self._relay(sender, header, (head, body))
            case headers.Open():
                self._open(sender, header, (head, body))
            case headers.RosterRequest():
                self._put(sender, self._roster())

    def _relay(self, sender: Peer, header: headers.Relay, message: Message) -> None:
        target = self._peers.get(header.to)
        if target is not None and target.role == sender.role:
            raise Malformed(f"a {sender.role} wrote to a {target.role}")
        if target is not None and self._put(target, message):
            if log.isEnabledFor(logging.DEBUG):
                log.debug("routed %s", _describe(sender, target, header, message[1]))
            return
        if header.to in self._peers:
            self._bounce(sender, header, "full", "the queue of the worker is full", retry_after=0.5)
        elif self._early:
            self._bounce(sender, header, "full", "the broker has just started", retry_after=0.5)
        else:
            self._bounce(sender, header, "gone", "the peer is not connected")

    @property
    def _early(self) -> bool:
        """Whether peers that are alive may not have announced themselves to this broker yet."""
        return time.monotonic() - self._started < GRACE

    def _open(self, sender: Peer, header: headers.Open, message: Message) -> None:
        if sender.role != "device":
            raise Malformed(f"a {sender.role} asked for a worker")
        known = self._wishes.get(sender.id)
        if known is None or known.header.channel != header.channel:
            self._wishes[sender.id] = Waiting(header, message, time.monotonic() + OPEN_PATIENCE)
        self._assign(header.service)

    def _assign(self, service: headers.Service) -> None:
        """Hands waiting wishes to workers with room, the most room first."""
        workers = self._serving(service)
        for wish in [wish for wish in self._wishes.values() if wish.header.service == service]:
            able = [peer for peer in workers if peer.room > 0 and peer.id not in wish.header.avoid]
            if able:
                worker = max(able, key=lambda peer: peer.room)
                worker.room -= 1
                if self._put(worker, wish.message):
                    del self._wishes[wish.header.sender]

    def _serving(self, service: headers.Service) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.service == service]

    def _announced(self, header: headers.Announce, route: bytes, member: str) -> None:
        peer = self._peers.get(header.sender)
        if self._routes.get(route, header.sender) != header.sender:
            raise Malformed("a second peer on one connection")
        gone: list[bytes] = []
        if peer is None and header.leaving:
            return
        if peer is None:
            peer = self._peers[header.sender] = Peer(header.sender, route, header.role, member)
            self._routes[route] = peer.id
            log.info("%s %s joined", header.role, member)
            # Held for dead once, and back: those that it watches have been told so, and hold nothing of it.
            if not self._early:
                gone = header.watching
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
        if peer.role == "worker":
            peer.service, peer.model, peer.room = header.service, header.model, header.room
        if not self._early:
            gone = gone or [id_ for id_ in header.watching if id_ not in self._peers]
        self._put(peer, self._welcome(gone))
        self._flush(peer)
        if peer.service is not None:
            self._assign(peer.service)

    def _member(self, envelope: zmq.Frame, header: headers.Announce) -> str:
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
        """Queues and sends; False when the message will not be delivered: the lane is full, or the peer gone."""
        if not peer.lane.put(message):
            return False
        self._flush(peer)
        return peer.id in self._peers

    def _flush(self, peer: Peer) -> None:
        self._blocked.discard(peer.id)
        while peer.id in self._peers and (message := peer.lane.take()) is not None:
            if not self._send(peer, message):
                peer.lane.put_back(message)
                return

    def _send(self, peer: Peer, message: Message) -> bool:
        try:
            send_frames(self._socket, peer.route, *message)
        except zmq.Again:
            self._blocked.add(peer.id)
            return False
        except zmq.ZMQError:
            # A worker's closed connection is its death; a device's is a network's, until its heartbeats end.
            if peer.role == "worker":
                self._remove(peer, "lost its connection")
            return False
        self.counters["messages_routed"] += 1
        self.counters["bytes_routed"] += len(message[0]) + len(message[1])
        return True

    def _remove(self, peer: Peer, why: str) -> None:
        if self._peers.pop(peer.id, None) is None:
            return
        log.info("%s %s %s", peer.role, peer.member, why)
        self.counters[f"{peer.role}s_gone"] += 1
        self._routes.pop(peer.route, None)
        self._wishes.pop(peer.id, None)
        self._blocked.discard(peer.id)
        for watcher in [other for other in self._peers.values() if peer.id in other.watching]:
            self._put(watcher, self._welcome([peer.id]))

    def _welcome(self, gone: list[bytes]) -> Message:
        return headers.encode_header(headers.Welcome(self._boot, self._fleet.roster().version, gone)), b""

    def _roster(self) -> Message:
        return headers.encode_header(headers.RosterReply()), self._fleet.roster_bytes()

    def _bounce(
        self, to: Peer, header: headers.Relay | headers.Open, reason: Any, detail: str, retry_after: float = 0.0
    ) -> None:
        self.counters[f"bounced_{reason}"] += 1
        bounce = headers.Bounce(reason, header.channel, detail=detail[:4096], retry_after=retry_after)
        if isinstance(header, headers.Relay):
            bounce = msgspec.structs.replace(
                bounce, session=header.session, epoch=header.epoch, seq=header.seq, peer=header.to
            )
        self._put(to, (headers.encode_header(bounce), b""))

    def _housekeeping(self, now: float) -> None:
        if self._fleet.refresh():
            log.info("roster version %d", self._fleet.roster().version)
        if self._fleet.roster().version > self._enforced:
            self._enforced = self._fleet.roster().version
            self._enforce_roster()
        probe = headers.encode_header(headers.Probe()), b""
        for peer in list(self._peers.values()):
            if now - peer.seen > HEARTBEAT * MISSED:
                self._remove(peer, "fell silent")
            elif peer.role == "worker":
                # Past its lane, which may be waiting for credit.
                self._send(peer, probe)
        self._answer_wishes(now)

    def _answer_wishes(self, now: float) -> None:
        """Tells devices whose wish cannot be met, or not soon."""
        for wish in list(self._wishes.values()):
            header = wish.header
            workers = self._serving(header.service)
            refused = all(peer.id in header.avoid for peer in workers)
            if not workers and not self._early:
                answer = "no-worker", self._served_models(), 0.0
            elif workers and (now > wish.deadline or (refused and not self._early)):
                answer = "busy", "every worker is full", 1.0
            else:
                continue
            del self._wishes[header.sender]
            self._bounce(self._peers[header.sender], header, *answer)

    def _served_models(self) -> str:
        services = {(p.model, p.service.first, p.service.last) for p in self._peers.values() if p.service}
        return ", ".join(f"{model} layers {first}:{last}" for model, first, last in sorted(services)) or "none"

    def _enforce_roster(self) -> None:
        for peer in list(self._peers.values()):
            member = self._fleet.roster().by_name(peer.member)
            if member is None or member.revoked:
                # It is told why; on TCP its connection stands, but nothing that it sends is taken any more.
                self._put(peer, self._roster())
                self._remove(peer, "was revoked")
            else:
                self._put(peer, self._welcome([]))


def _describe(sender: Peer, target: Peer, header: headers.Relay, body: Body) -> str:
    """All that the broker can know of a message."""
    start = memoryview(body)[:16]  # type: ignore[arg-type]
    return (
        f"{header.kind.name} {sender.member} -> {target.member}: channel {header.channel}, "
        f"session {header.session}, seq {header.seq}, {len(body)} bytes {start.hex()}…"
    )


def _claim(path: Path) -> None:
    """Makes the directory of an ipc socket, or checks that nobody else may enter it; and that no broker is there.

    Raises:
        ConfigError
    """
    directory = path.parent
    try:
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}") from None
    found = directory.stat()
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.getuid():
        raise ConfigError(f"{directory} is open to other users: `chmod 700` it, or bind to a directory of your own")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        # A second bind would take the path away from the first, without a word.
        probe.connect(str(path))
        raise ConfigError(f"cannot listen on ipc://{path}: a broker is there")
