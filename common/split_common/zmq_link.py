"""The ZeroMQ transport: a peer's DEALER socket and the thread that owns it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter, deque

import msgspec
import zmq
import zmq.utils.z85

from split_common import wire
from split_common.errors import BrokerUnreachable, Malformed, SplitError
from split_common.fleet import Fleet
from split_common.keys import Identity
from split_common.transport import HEARTBEAT, MISSED, Handler

log = logging.getLogger(__name__)

#: Bytes of unsent and unread messages after which a peer tells the broker at once what it has received.
CREDIT_STEP = 4 * 1024 * 1024


def curve_client(sock: zmq.Socket[bytes], fleet: Fleet, identity: Identity) -> None:
    """Secures a client socket with CurveZMQ (RFC 26): it will talk to the fleet's broker alone."""
    public, secret = identity.curve_z85()
    broker = next(m for m in fleet.roster().members if m.role == "broker" and not m.revoked)
    sock.curve_publickey = public
    sock.curve_secretkey = secret
    sock.curve_serverkey = zmq.utils.z85.encode(broker.curve_key)


class ZmqLink:
    """A peer's connection to the broker (`split_common.transport.Transport`)."""

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        self._address = address
        self._fleet = fleet
        self._identity = identity
        self._outbox: deque[list[bytes]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        self._announce_now = True
        self._boot: bytes | None = None
        self._heard = 0.0
        self._received = 0
        self._credited = 0
        self._thread: threading.Thread | None = None
        #: Messages dropped because they broke the protocol, by type of error; and bytes and messages moved.
        self.counters: Counter[str] = Counter()

    @property
    def alive(self) -> bool:
        return time.monotonic() - self._heard < HEARTBEAT * MISSED

    def start(self, handler: Handler, timeout: float) -> None:
        self._handler = handler
        self._thread = threading.Thread(target=self._run, name="lambda-split-link", daemon=True)
        self._thread.start()
        if not self._welcomed.wait(timeout):
            self.close()
            raise BrokerUnreachable(
                f"no answer from the broker at {self._address} within {timeout:g} s: is `lambda-split broker` "
                "running there, with the same keys, and is this member in its roster?"
            )

    def send(self, header: wire.Header, body: bytes = b"") -> None:
        self._outbox.append([wire.encode_header(header), body])
        self._wake()

    def announce(self) -> None:
        self._announce_now = True
        self._wake()

    def close(self) -> None:
        self._closing.set()
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._wake_read.close()
        self._wake_write.close()

    def _wake(self) -> None:
        # A full pipe wakes the thread as well as one more byte would; a closed one has no thread to wake.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    # --- the link's own thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        context = zmq.Context()
        sock = context.socket(zmq.DEALER)
        try:
            sock.linger = 500
            sock.immediate = True
            sock.maxmsgsize = max(wire.MAX_BODY, wire.MAX_HEADER)
            sock.sndhwm = sock.rcvhwm = 256
            sock.reconnect_ivl, sock.reconnect_ivl_max = 50, 1000
            if self._address.startswith("tcp://"):
                curve_client(sock, self._fleet, self._identity)
            sock.connect(self._address)
            self._loop(sock)
        finally:
            sock.close()
            context.term()

    def _loop(self, sock: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        next_announce = 0.0
        while True:
            poller.register(sock, zmq.POLLIN | (zmq.POLLOUT if self._outbox else 0))
            wait = max(0.0, next_announce - time.monotonic())
            events = dict(poller.poll(int(wait * 1000) + 1))
            if self._wake_read.fileno() in events:
                with contextlib.suppress(BlockingIOError):
                    while self._wake_read.recv(4096):
                        pass
            if events.get(sock, 0) & zmq.POLLIN:
                self._receive(sock)
            if self._announce_now or time.monotonic() >= next_announce:
                self._announce_now = False
                next_announce = time.monotonic() + HEARTBEAT
                self._send_announcement(sock)
            self._flush(sock)
            if self._closing.is_set():
                self._send_announcement(sock, leaving=True)
                return

    def _flush(self, sock: zmq.Socket[bytes]) -> None:
        while self._outbox:
            frames = self._outbox[0]
            try:
                sock.send_multipart(frames, zmq.NOBLOCK, copy=len(frames[1]) < 65536)
            except zmq.Again:
                return
            self._outbox.popleft()
            self.counters["messages_sent"] += 1
            self.counters["bytes_sent"] += len(frames[0]) + len(frames[1])

    def _send_announcement(self, sock: zmq.Socket[bytes], leaving: bool = False) -> None:
        announcement = msgspec.structs.replace(
            self._handler.announcement(), received=self._received, leaving=leaving
        )
        self._credited = self._received
        # With no connection there is nobody to tell: the next heartbeat says the same.
        with contextlib.suppress(zmq.Again):
            sock.send_multipart([wire.encode_header(announcement), b""], zmq.NOBLOCK)

    def _receive(self, sock: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.counters["messages_received"] += 1
            self.counters["bytes_received"] += sum(map(len, frames))
            try:
                if len(frames) != 2:
                    raise Malformed(f"{len(frames)} frames")
                header, body = wire.decode_header(frames[0]), frames[1]
                self._received += len(body)
                self._dispatch(header, body)
            except SplitError as error:
                self.counters[type(error).__name__] += 1
                log.warning("dropped a message: %s", error)
            except Exception:
                self.counters["HandlerError"] += 1
                log.exception("a message handler failed")
            if self._received - self._credited > CREDIT_STEP:
                self._announce_now = True

    def _dispatch(self, header: wire.AnyHeader, body: bytes) -> None:
        self._heard = time.monotonic()
        match header:
            case wire.Probe():
                pass
            case wire.Welcome():
                if self._boot not in (None, header.boot):
                    self._announce_now = True
                    self._handler.on_reset()
                self._boot = header.boot
                self._welcomed.set()
                if header.roster_version > self._fleet.roster().version:
                    sender = self._handler.announcement().sender
                    self.send(wire.RosterRequest(sender))
                if header.gone:
                    self._handler.on_gone(header.gone)
            case wire.RosterReply():
                before = self._fleet.roster().version
                if self._fleet.accept_roster(body).version > before:
                    self._handler.on_roster()
            case _:
                self._handler.on_message(header, body)
