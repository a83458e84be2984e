"""The ZeroMQ transport: a peer's DEALER socket, which one thread at a time uses.

Whoever sends does so in his own thread, unless another one has the socket just then and does it for him. The
link's thread waits for what arrives, and sends heartbeats and what the socket would not take. libzmq's file
descriptor says only once that something has changed: whoever may have taken that from the link's thread wakes it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import threading
import time
from collections import Counter, deque
from typing import TypeVar

import msgspec
import zmq
import zmq.utils.z85

from split_common import wire
from split_common.errors import BrokerUnreachable, ConfigError, KeysError, Malformed, Oversized, SplitError
from split_common.fleet import Fleet
from split_common.keys import Identity
from split_common.transport import HEARTBEAT, MISSED, Handler, count_dropped

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Bytes received after which a peer tells the broker so at once, and not with its next heartbeat.
CREDIT_STEP = 4 * 1024 * 1024

#: Bytes that may wait to be sent. More are dropped: a broker that takes nothing must not fill the memory.
OUTBOX_BYTES = 256 * 1024 * 1024

#: Seconds without a word from the broker after which the connection is made anew: libzmq gives a connection up for
#: good when what arrives over it breaks ZMTP or CURVE, as damaged bytes do.
SILENCE = HEARTBEAT * MISSED

#: Arithmetic with pyzmq's own flags takes longer than what they are meant for.
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
NOBLOCK, NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

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


def send_frames(sock: zmq.Socket[bytes], *frames: zmq.Frame | bytes) -> None:
    """Sends a message, whose last frame is not copied if it is large.

    Raises:
        zmq.Again: the socket takes nothing just now.
    """
    for frame in frames[:-1]:
        sock.send(frame, NOBLOCK_MORE)
    sock.send(frames[-1], NOBLOCK, copy=False)


def receive_frames(sock: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """The next message, waited for as long as the socket's `rcvtimeo` says. Raises zmq.Again when there is none."""
    frames = [sock.recv(copy=False)]
    while frames[-1].more:
        frames.append(sock.recv(copy=False))
    return frames


class ZmqLink:
    """A peer's connection to the broker (`split_common.transport.Transport`)."""

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        self._address = address
        self._fleet = fleet
        self._identity = identity
        # Held by who uses the socket and what waits for it. `send` never waits for it.
        self._turn = threading.Lock()
        self._sock: zmq.Socket[bytes] | None = None
        # What `send` hands over to whoever has the turn, who counts what the socket has not taken yet.
        self._handed: deque[tuple[bytes, bytes]] = deque()
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        self._unsent_bytes = 0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        self._announce_now = True
        # Whether the broker was told over this connection who this is.
        self._announced = False
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
            self._sock = self._connect(context)
        except SplitError:
            context.term()
            self.close()
            raise
        self._thread = threading.Thread(target=self._run, args=[context], name="lambda-split-link", daemon=True)
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
        self._handed.append((wire.encode_header(header), body))
        # Who has the turn looks again after it for what was handed in meanwhile.
        while self._handed and self._sock is not None and self._turn.acquire(blocking=False):
            try:
                noticed = self._sock is not None and self._flush(self._sock)
            finally:
                self._turn.release()
            if noticed and threading.current_thread() is not self._thread:
                self._wake()

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        return events.get(timeout=timeout)

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

    # --- with the turn -------------------------------------------------------------------------------------

    def _flush(self, sock: zmq.Socket[bytes]) -> bool:
        """Sends what was handed in, and what waits; whether the socket has something for the link's thread."""
        while self._handed:
            frames = self._handed.popleft()
            if self._unsent_bytes + len(frames[1]) > OUTBOX_BYTES:
                self.counters["outbox_full"] += 1
                continue
            self._unsent.append(frames)
            self._unsent_bytes += len(frames[1])
        # An announcement goes first: a broker that has just started must know this peer.
        while self._unsent and self._announced:
            frames = self._unsent[0]
            try:
                send_frames(sock, *frames)
            except zmq.Again:
                break
            self._unsent.popleft()
            self._unsent_bytes -= len(frames[1])
            self.counters["messages_sent"] += 1
            self.counters["bytes_sent"] += len(frames[0]) + len(frames[1])
        return self._ready(sock) != 0

    def _ready(self, sock: zmq.Socket[bytes]) -> int:
        """Of POLLIN and POLLOUT, those that the link's thread has use for."""
        waiting = (self._unsent and self._announced) or self._announce_now
        return int(sock.get(zmq.EVENTS)) & (POLLIN | POLLOUT if waiting else POLLIN)

    # --- the link's own thread -----------------------------------------------------------------------------

    def _run(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        assert self._sock is not None
        try:
            while self._loop(self._sock):
                with contextlib.suppress(SplitError), self._turn:
                    old, self._sock = self._sock, self._connect(context)
                    self._announced = False
                    old.close(0)
        finally:
            with self._turn:
                sock, self._sock = self._sock, None
                sock.close()
            context.term()
            self._close_pipe()

    def _loop(self, sock: zmq.Socket[bytes]) -> bool:
        """Serves a connection until the link is closed, or until the broker has long been silent: then True."""
        connected = time.monotonic()
        poller = select.poll()
        poller.register(int(sock.get(zmq.FD)), select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        next_announce = 0.0
        while True:
            if self._announce_now or time.monotonic() >= next_announce:
                next_announce = time.monotonic() + HEARTBEAT
                # Without a connection it is sent as soon as there is one.
                self._announce_now = False
                self._announce_now |= not self._send_announcement(sock)
            if self._handed or self._unsent:
                with self._turn:
                    self._flush(sock)
            if self._closing.is_set():
                self._send_announcement(sock, leaving=True)
                return False
            if self._receive(sock) or self._handed:
                continue
            # Not before all that waited is read: this thread itself may have been held up.
            if time.monotonic() - max(connected, self._heard) > SILENCE:
                return True
            wait = max(0.0, next_announce - time.monotonic())
            for file, _ in poller.poll(int(wait * 1000) + 1):
                if file == self._wake_read.fileno():
                    self._wake_read.recv(4096)

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
        with self._turn:
            try:
                send_frames(sock, wire.encode_header(announcement), b"")
                self._announced = True
            except zmq.Again:
                self._announced = False
            return self._announced

    def _receive(self, sock: zmq.Socket[bytes]) -> bool:
        """Takes what has arrived; whether the socket has more to do."""
        for _ in range(TURN):
            with self._turn:
                ready = self._ready(sock)
                if not ready & POLLIN:
                    return ready != 0
                frames = [frame.bytes for frame in receive_frames(sock)]
            self._take(frames)
        return True

    def _take(self, frames: list[bytes]) -> None:
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
