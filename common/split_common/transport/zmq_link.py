"""The ZeroMQ transport: a peer's DEALER socket, which one thread at a time uses.

Whoever sends does so in his own thread, unless another one has the socket just then and does it for him. Whoever
reads (`split_common.transport.leading`) waits for what arrives, and sends heartbeats and what the socket would not
take. libzmq's file descriptor says only once that something has changed: who may take that from him, wakes him.
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
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
import zmq
import zmq.utils.z85

from split_common import headers
from split_common.errors import BrokerUnreachable, ConfigError, KeysError, Malformed, Oversized, SplitError
from split_common.fleet import Fleet
from split_common.keys import Identity
from split_common.transport import HEARTBEAT, MISSED, Handler, count_dropped
from split_common.transport.leading import Lead

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

#: Messages that are taken at once: a flood must not keep the heartbeat from being sent.
TURN = 256

#: Seconds before the socket is used again after that failed.
PAUSE = 0.1


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
        self._poller = select.poll()
        # What `send` hands over to whoever has the turn, who counts what the socket has not taken yet.
        self._handed: deque[tuple[bytes, bytes]] = deque()
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        self._unsent_bytes = 0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = threading.Event()
        self._lead = Lead(partial(self._contained, self._read), self._closing)
        self._welcomed = threading.Event()
        self._announce_now = True
        self._next_announce = 0.0
        # Whether the broker was told over this connection who this is.
        self._announced = False
        self._sender = bytes(8)
        self._boot: bytes | None = None
        self._next_reset = 0.0
        self._roster_version = fleet.roster().version
        self._connected = self._heard = 0.0
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
            self._use(self._connect(context))
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
            sock.maxmsgsize = headers.MAX_FRAME
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

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        if len(body) > headers.MAX_BODY:
            raise Oversized(f"body of {len(body)} bytes (at most {headers.MAX_BODY})")
        self._handed.append((headers.encode_header(header), body))
        self._pass_on()

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        return self._lead.receive(events, timeout)

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

    # --- sending -------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        """Sends what was handed in, unless another thread has the socket: who has it does so after his turn."""
        while self._handed and self._sock is not None and self._turn.acquire(blocking=False):
            try:
                if self._sock is not None:
                    self._flush(self._sock)
                    # Who begins to read looks at the socket first.
                    if self._lead.is_anothers and self._ready(self._sock):
                        self._wake()
            finally:
                self._turn.release()

    def _flush(self, sock: zmq.Socket[bytes]) -> None:
        """Sends what was handed in, and what waits. With the turn."""
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

    def _ready(self, sock: zmq.Socket[bytes]) -> int:
        """Of POLLIN and POLLOUT, those that who reads has use for. With the turn."""
        waiting = (self._unsent and self._announced) or self._announce_now
        return int(sock.get(zmq.EVENTS)) & (POLLIN | POLLOUT if waiting else POLLIN)

    # --- the link's own thread -----------------------------------------------------------------------------

    def _run(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        try:
            while not self._closing.is_set():
                if self._silent:
                    with self._lead.turn:
                        self._contained(self._connect_anew, context)
                self._lead.serve(HEARTBEAT)
        finally:
            with self._lead.turn:
                assert self._sock is not None
                with self._turn:
                    self._flush(self._sock)
                self._send_announcement(self._sock, leaving=True)
                with self._turn:
                    sock, self._sock = self._sock, None
                    sock.close()
            context.term()
            self._close_pipe()

    @property
    def _silent(self) -> bool:
        return time.monotonic() - max(self._connected, self._heard) > SILENCE

    def _connect_anew(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Leaves a connection over which nothing has come for long, unless there is no way to make another one."""
        old = self._sock
        assert old is not None
        # Not before all that waited is read: this process itself may have been held up.
        while self._take_arrived(old):
            pass
        if self._silent:
            self._connected = time.monotonic()
            with contextlib.suppress(SplitError), self._turn:
                self._use(self._connect(context))
                old.close(0)

    def _use(self, sock: zmq.Socket[bytes]) -> None:
        self._sock = sock
        self._announced = False
        self._announce_now = True
        self._connected = time.monotonic()
        self._poller = select.poll()
        self._poller.register(int(sock.get(zmq.FD)), select.POLLIN)
        self._poller.register(self._wake_read, select.POLLIN)

    # --- with the lead -------------------------------------------------------------------------------------

    def _contained(self, act: Callable[[_T], None], argument: _T) -> None:
        """Does something with the lead. What goes wrong with the socket hits no caller who reads."""
        try:
            act(argument)
        except Exception:
            self.counters["failures"] += 1
            log.exception("using the connection to the broker failed, and goes on")
            self._closing.wait(PAUSE)

    def _read(self, wait: float) -> None:
        """Sends what is due; takes what has arrived, or else what does within some seconds."""
        sock = self._sock
        assert sock is not None
        now = time.monotonic()
        if self._announce_now or now >= self._next_announce:
            self._next_announce = now + HEARTBEAT
            # Without a connection it is sent as soon as there is one.
            self._announce_now = False
            self._announce_now |= not self._send_announcement(sock)
        if self._handed or self._unsent:
            with self._turn:
                self._flush(sock)
        if self._take_arrived(sock) or self._handed:
            return
        wait = max(0.0, min(wait, self._next_announce - time.monotonic()))
        for file, _ in self._poller.poll(int(wait * 1000) + 1):
            if file == self._wake_read.fileno():
                self._wake_read.recv(4096)
        self._take_arrived(sock)

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
                send_frames(sock, headers.encode_header(announcement), b"")
                self._announced = True
            except zmq.Again:
                self._announced = False
            return self._announced

    def _take_arrived(self, sock: zmq.Socket[bytes]) -> bool:
        """Takes what has arrived; whether there was something, or the socket can send what waits for that."""
        for taken in range(TURN):
            with self._turn:
                ready = self._ready(sock)
                frames = [frame.bytes for frame in receive_frames(sock)] if ready & POLLIN else None
            # Meanwhile others may have handed in messages instead of sending them themselves.
            self._pass_on()
            if frames is None:
                return taken > 0 or ready != 0
            self._take(frames)
        return True

    def _take(self, frames: list[bytes]) -> None:
        self.counters["messages_received"] += 1
        self.counters["bytes_received"] += sum(map(len, frames))
        self._received += len(frames[-1])
        try:
            if len(frames) != 2:
                raise Malformed(f"{len(frames)} frames")
            self._dispatch(headers.decode_header(frames[0]), headers.check_body(frames[1]))
        except SplitError as error:
            count_dropped(self.counters, error)
        except Exception:
            self._handler_failed()
        if self._received - self._credited > CREDIT_STEP:
            self._announce_now = True

    def _handler_failed(self) -> None:
        self.counters["HandlerError"] += 1
        log.exception("a message handler failed")

    def _dispatch(self, header: headers.AnyHeader, body: bytes) -> None:
        self._heard = time.monotonic()
        match header:
            case headers.Probe():
                pass
            case headers.Welcome():
                self._greet(header)
            case headers.RosterReply():
                self._fleet.accept_roster(body)
                self._check_roster()
            case _:
                self._handler.on_message(header, body)

    def _greet(self, welcome: headers.Welcome) -> None:
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
            self.send(headers.RosterRequest(self._sender))
        self._check_roster()

    def _check_roster(self) -> None:
        """The fleet's roster may be newer because of a message, or because another user of it reread the file."""
        version = self._fleet.roster().version
        if version > self._roster_version:
            self._roster_version = version
            self._handler.on_roster()
