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
from split_common.errors import BrokerUnreachable, ConfigError, KeysError, Malformed, Oversized, SplitError
from split_common.fleet import Fleet
from split_common.keys import Identity
from split_common.transport import HEARTBEAT, MISSED, Handler, count_dropped

log = logging.getLogger(__name__)

#: Bytes received after which a peer tells the broker so at once, and not with its next heartbeat.
CREDIT_STEP = 4 * 1024 * 1024

#: Bytes that may wait to be sent. More are dropped: a broker that takes nothing must not fill the memory.
OUTBOX_BYTES = 256 * 1024 * 1024

#: Seconds without a word from the broker after which the connection is made anew: libzmq gives a connection up for
#: good when what arrives over it breaks ZMTP or CURVE, as damaged bytes do.
SILENCE = HEARTBEAT * MISSED

#: Messages that are taken in one turn of the loop: a flood must not keep the heartbeat from being sent.
TURN = 256


def curve_client(sock: zmq.Socket[bytes], fleet: Fleet, identity: Identity) -> None:
    """Secures a client socket with CurveZMQ (RFC 26): it will talk to the fleet's broker alone.

    Raises:
        KeysError: the fleet has no broker.
    """
    public, secret = identity.curve_z85()
    broker = next((m for m in fleet.roster().members if m.role == "broker" and not m.revoked), None)
    if broker is None:
        raise KeysError(f"the roster in {fleet.path} lists no broker")
    sock.curve_publickey = public
    sock.curve_secretkey = secret
    sock.curve_serverkey = zmq.utils.z85.encode(broker.curve_key)


class ZmqLink:
    """A peer's connection to the broker (`split_common.transport.Transport`)."""

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        self._address = address
        self._fleet = fleet
        self._identity = identity
        # What `send` hands over to the link's thread; the thread alone counts what it has not sent yet.
        self._handed: deque[list[bytes]] = deque()
        self._unsent: deque[list[bytes]] = deque()
        self._unsent_bytes = 0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        self._announce_now = True
        self._sender = bytes(8)
        self._boot: bytes | None = None
        self._next_reset = 0.0
        self._roster_version = fleet.roster().version
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
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            sock = self._connect(context)
        except SplitError:
            context.term()
            self.close()
            raise
        self._thread = threading.Thread(
            target=self._run, args=(context, sock), name="lambda-split-link", daemon=True
        )
        self._thread.start()
        if not self._welcomed.wait(timeout):
            self.close()
            raise BrokerUnreachable(
                f"no answer from the broker at {self._address} within {timeout:g} s: is `lambda-split broker` "
                "running there, with the same keys, and is this member in its roster and not revoked?"
            )

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        """A socket that connects by itself, also when the broker is away. Raises KeysError, ConfigError."""
        sock = context.socket(zmq.DEALER)
        try:
            sock.linger = 500
            sock.immediate = True
            sock.ipv6 = "[" in self._address
            sock.maxmsgsize = wire.MAX_FRAME
            sock.sndhwm = sock.rcvhwm = 256
            sock.reconnect_ivl, sock.reconnect_ivl_max = 50, 1000
            if self._address.startswith("tcp://"):
                curve_client(sock, self._fleet, self._identity)
            sock.connect(self._address)
        except zmq.ZMQError as error:
            sock.close()
            raise ConfigError(f"cannot connect to {self._address}: {error}") from None
        except SplitError:
            sock.close()
            raise
        return sock

    def send(self, header: wire.Header, body: bytes = b"") -> None:
        if len(body) > wire.MAX_BODY:
            raise Oversized(f"body of {len(body)} bytes (at most {wire.MAX_BODY})")
        self._handed.append([wire.encode_header(header), body])
        self._wake()

    def announce(self) -> None:
        self._announce_now = True
        self._wake()

    def close(self) -> None:
        self._closing.set()
        self._wake()
        if self._thread is None:
            self._close_pipe()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def _wake(self) -> None:
        # A full pipe wakes the thread as well as one more byte would; a closed one has no thread to wake.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _close_pipe(self) -> None:
        self._wake_read.close()
        self._wake_write.close()

    # --- the link's own thread -----------------------------------------------------------------------------

    def _run(self, context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes]) -> None:
        try:
            while self._loop(sock):
                with contextlib.suppress(SplitError):
                    fresh = self._connect(context)
                    sock.close(0)
                    sock = fresh
        finally:
            sock.close()
            context.term()
            self._close_pipe()

    def _loop(self, sock: zmq.Socket[bytes]) -> bool:
        """Serves a connection until the link is closed, or until the broker has long been silent: then True."""
        connected = time.monotonic()
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        next_announce = 0.0
        while True:
            poller.register(sock, zmq.POLLIN | (zmq.POLLOUT if self._unsent or self._announce_now else 0))
            wait = max(0.0, next_announce - time.monotonic())
            events = dict(poller.poll(int(wait * 1000) + 1))
            if self._wake_read.fileno() in events:
                with contextlib.suppress(BlockingIOError):
                    while self._wake_read.recv(4096):
                        pass
            if events.get(sock, 0) & zmq.POLLIN:
                self._receive(sock)
            # Before anything else is sent: a broker that has just started must know this peer first.
            if self._announce_now or time.monotonic() >= next_announce:
                next_announce = time.monotonic() + HEARTBEAT
                # Without a connection it is sent as soon as there is one.
                self._announce_now = False
                self._announce_now |= not self._send_announcement(sock)
            self._flush(sock)
            if self._closing.is_set():
                self._send_announcement(sock, leaving=True)
                return False
            if time.monotonic() - max(connected, self._heard) > SILENCE:
                return True

    def _flush(self, sock: zmq.Socket[bytes]) -> None:
        while self._handed:
            frames = self._handed.popleft()
            if self._unsent_bytes + len(frames[1]) > OUTBOX_BYTES:
                self.counters["outbox_full"] += 1
                continue
            self._unsent.append(frames)
            self._unsent_bytes += len(frames[1])
        while self._unsent:
            frames = self._unsent[0]
            try:
                sock.send_multipart(frames, zmq.NOBLOCK, copy=len(frames[1]) < 65536)
            except zmq.Again:
                return
            self._unsent.popleft()
            self._unsent_bytes -= len(frames[1])
            self.counters["messages_sent"] += 1
            self.counters["bytes_sent"] += len(frames[0]) + len(frames[1])

    def _send_announcement(self, sock: zmq.Socket[bytes], leaving: bool = False) -> bool:
        """Whether there was a connection to send it over."""
        try:
            announcement = self._handler.announcement()
        except Exception:
            self._handler_failed()
            return True
        self._sender = announcement.sender
        self._credited = self._received
        announcement = msgspec.structs.replace(
            announcement, received=self._received, leaving=leaving or announcement.leaving
        )
        try:
            sock.send_multipart([wire.encode_header(announcement), b""], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self, sock: zmq.Socket[bytes]) -> None:
        for _ in range(TURN):
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.counters["messages_received"] += 1
            self.counters["bytes_received"] += sum(map(len, frames))
            self._received += len(frames[-1])
            try:
                if len(frames) != 2:
                    raise Malformed(f"{len(frames)} frames")
                self._dispatch(wire.decode_header(frames[0]), wire.check_body(frames[1]))
            except SplitError as error:
                count_dropped(self.counters, error)
            except Exception:
                self._handler_failed()
            if self._received - self._credited > CREDIT_STEP:
                self._announce_now = True

    def _handler_failed(self) -> None:
        self.counters["HandlerError"] += 1
        log.exception("a message handler failed")

    def _dispatch(self, header: wire.AnyHeader, body: bytes) -> None:
        self._heard = time.monotonic()
        match header:
            case wire.Probe():
                pass
            case wire.Welcome():
                self._greet(header)
            case wire.RosterReply():
                self._fleet.accept_roster(body)
                self._check_roster()
            case _:
                self._handler.on_message(header, body)

    def _greet(self, welcome: wire.Welcome) -> None:
        known, self._boot = self._boot, welcome.boot
        self._welcomed.set()
        # A broker that changes its name with every message must not be sent everything again each time.
        if known not in (None, welcome.boot) and time.monotonic() >= self._next_reset:
            self._next_reset = time.monotonic() + HEARTBEAT
            self._announce_now = True
            self._handler.on_reset()
        if welcome.gone:
            self._handler.on_gone(welcome.gone)
        if welcome.roster_version > self._fleet.roster().version:
            self.send(wire.RosterRequest(self._sender))
        self._check_roster()

    def _check_roster(self) -> None:
        """The fleet's roster may be newer because of a message, or because another user of it reread the file."""
        version = self._fleet.roster().version
        if version > self._roster_version:
            self._roster_version = version
            self._handler.on_roster()
