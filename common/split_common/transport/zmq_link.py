"""The ZeroMQ transport: a peer's DEALER socket, which one thread at a time uses.

A thread that sends uses the socket itself, unless another thread has it and sends for both. The thread that reads
(`split_common.transport.leader`) waits for what arrives, and sends heartbeats and what the socket did not accept
before. libzmq's file descriptor signals a change only once, so a thread that may have consumed the signal by using
the socket wakes the one that reads.
"""

from __future__ import annotations

import contextlib
import math
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

from split_common.errors import BrokerUnreachable, ConfigError, Malformed, SplitError
from split_common.protocol import headers
from split_common.transport.address import host_and_port
from split_common.transport.base import HEARTBEAT, MISSED, OUTBOX_BYTES, Handler
from split_common.transport.leader import LeaderLock
from split_common.transport.progress import Progress
from split_common.transport.supervised import Supervisor, handled
from split_common.transport.zmq_socket import HANDSHAKE_LIMIT, HIGH_WATER, curve_client, receive_frames, send_frames
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Identity

_T = TypeVar("_T")

#: Bytes received after which a peer confirms them at once, not with its next heartbeat.
CREDIT_STEP = 4 * 1024 * 1024

#: Seconds of silence from the broker after which the link connects again. libzmq gives a connection up for good if
#: damaged bytes break ZMTP or CURVE.
SILENCE = HEARTBEAT * MISSED

#: Longest time, in seconds, that a look whether anything listens at a silent broker's address takes.
PROBE_TIMEOUT = 2.0

#: Plain integers, because arithmetic with pyzmq's enums takes longer than the calls that use them.
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)

#: Most messages taken in one turn: a flood must not delay heartbeats.
TURN = 256


class ZmqLink:
    """A peer's connection to the broker (`split_common.transport.Transport`)."""

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        self._address = address
        self._fleet = fleet
        self._identity = identity
        # Guards the socket, `_unsent` and `_announced`. `send` never waits for it.
        self._turn = threading.Lock()
        self._sock: zmq.Socket[bytes] | None = None
        self._poller = select.poll()
        # Messages that `send` handed over, and those that the thread with the turn has taken over and counted.
        self._handed: deque[tuple[bytes, bytes]] = deque()
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        self._unsent_bytes = 0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        self._announce_now = True
        self._next_announce = 0.0
        # Whether this peer has announced itself over this connection.
        self._announced = False
        self._sender = bytes(8)
        self._boot: bytes | None = None
        self._next_reset = 0.0
        self._roster_version = fleet.roster().version
        self._connected = self._heard = 0.0
        # When a slow connection was last found to be moving.
        self._moved = -math.inf
        # Used by whoever has the turn.
        self._progress = Progress()
        self._received = 0
        self._credited = 0
        self._thread: threading.Thread | None = None
        #: Messages dropped because they broke the protocol, by type of error; and bytes and messages moved.
        self.counters: Counter[str] = Counter()
        self._supervisor = Supervisor("the connection to the broker", self.counters, self._closing)
        self._leader_lock = LeaderLock(lambda wait: self._supervisor.run(self._read, wait), self._closing)

    @property
    def alive(self) -> bool:
        return time.monotonic() - self._heard < HEARTBEAT * MISSED

    @property
    def sending(self) -> bool:
        return time.monotonic() - self._moved < HEARTBEAT * MISSED

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
                f"no answer from the broker at {self._address} within {timeout:g} s{_why_silent(self._address)}"
            )

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        """A socket that connects by itself, even if the broker is away for a while.

        Raises:
            KeysError: the fleet's roster lists no broker.
            ConfigError: the address cannot be used.
        """
        sock = context.socket(zmq.DEALER)
        try:
            sock.linger = 500
            sock.immediate = True
            sock.ipv6 = "[" in self._address
            sock.maxmsgsize = headers.MAX_FRAME
            sock.sndhwm = sock.rcvhwm = HIGH_WATER
            sock.handshake_ivl = HANDSHAKE_LIMIT
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
        self._handed.append((headers.encode_header(header), headers.check_body(body)))
        self._pass_on()

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        return self._leader_lock.receive(events, timeout)

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
        # A full pipe wakes the thread, too. A closed one has no thread to wake.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _close_pipe(self) -> None:
        self._wake_read.close()
        self._wake_write.close()

    # --- sending -------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        """Sends what was handed over. If another thread has the socket, that thread does so after its turn."""
        while self._handed and self._sock is not None and self._turn.acquire(blocking=False):
            try:
                if self._sock is not None:
                    self._flush(self._sock)
                    # A thread that begins to read checks the socket first; one that waits has to be woken.
                    if self._leader_lock.held_by_another and self._ready(self._sock):
                        self._wake()
            finally:
                self._turn.release()

    def _flush(self, sock: zmq.Socket[bytes]) -> None:
        """Sends what was handed over and what waits. The caller has the turn."""
        while self._handed:
            frames = self._handed.popleft()
            if self._unsent_bytes + len(frames[1]) > OUTBOX_BYTES:
                self.counters["outbox_full"] += 1
                continue
            self._unsent.append(frames)
            self._unsent_bytes += len(frames[1])
        # The announcement goes first: a broker that has just started must know this peer.
        while self._unsent and self._announced:
            frames = self._unsent[0]
            try:
                send_frames(sock, *frames)
            except zmq.Again:
                break
            self._unsent.popleft()
            self._unsent_bytes -= len(frames[1])
            self._progress.gave(*map(len, frames))
            self.counters["messages_sent"] += 1
            self.counters["bytes_sent"] += len(frames[0]) + len(frames[1])

    def _ready(self, sock: zmq.Socket[bytes]) -> int:
        """Those of POLLIN and POLLOUT that the thread that reads has to handle. The caller has the turn."""
        waiting = (self._unsent and self._announced) or self._announce_now
        return int(sock.get(zmq.EVENTS)) & (POLLIN | POLLOUT if waiting else POLLIN)

    # --- the link's own thread -----------------------------------------------------------------------------

    def _run(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        try:
            while not self._closing.is_set():
                if self._silent:
                    with self._leader_lock.turn:
                        self._supervisor.run(self._connect_again, context)
                self._leader_lock.serve(HEARTBEAT)
        finally:
            with self._leader_lock.turn:
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

    def _connect_again(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Replaces a connection over which nothing has come for `SILENCE`, if a new one can be made."""
        old = self._sock
        assert old is not None
        # What has already arrived is read first: this process itself may have stalled.
        known = -1
        while (received := self.counters["messages_received"]) != known:
            known = received
            self._take_arrived(old)
        if self._silent:
            self._connected = time.monotonic()
            with contextlib.suppress(SplitError), self._turn:
                self._use(self._connect(context))
                old.close(0)

    def _use(self, sock: zmq.Socket[bytes]) -> None:
        self._sock = sock
        self._progress.forget()
        self._announced = False
        self._announce_now = True
        self._connected = time.monotonic()
        self._poller = select.poll()
        self._poller.register(int(sock.get(zmq.FD)), select.POLLIN)
        self._poller.register(self._wake_read, select.POLLIN)

    # --- on the thread that reads ----------------------------------------------------------------------------

    def _read(self, wait: float) -> None:
        """Sends what is due, and takes what has arrived or arrives within `wait` seconds."""
        sock = self._sock
        assert sock is not None
        now = time.monotonic()
        if self._announce_now or now >= self._next_announce:
            self._next_announce = now + HEARTBEAT
            if now - self._heard > HEARTBEAT:
                with self._turn:
                    moves = self._progress.moves()
                if moves:
                    self._heard = self._moved = now
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
        """Announces this peer. False if there is no connection."""
        announcement = handled(self.counters, self._handler.announcement)
        if announcement is None:
            return True
        self._sender = announcement.sender
        self._credited = self._received
        announcement = msgspec.structs.replace(
            announcement, received=self._received, leaving=leaving or announcement.leaving
        )
        with self._turn:
            try:
                frames = headers.encode_header(announcement), self._identity.certificate_bytes
                send_frames(sock, *frames)
                self._announced = True
                self._progress.gave(*map(len, frames), heartbeat=True)
            except zmq.Again:
                self._announced = False
            return self._announced

    def _take_arrived(self, sock: zmq.Socket[bytes]) -> bool:
        """Takes what has arrived. True if anything had, or if the socket can send what waits."""
        for taken in range(TURN):
            with self._turn:
                ready = self._ready(sock)
                frames = self._receive(sock) if ready & POLLIN else None
            # Meanwhile other threads may have handed over messages because this one had the turn.
            self._pass_on()
            if frames is None:
                return taken > 0 or ready != 0
            self._take(frames)
        return True

    def _receive(self, sock: zmq.Socket[bytes]) -> list[bytes]:
        """The next message. The caller has the turn."""
        frames = receive_frames(sock, 2)
        if time.monotonic() - self._heard > HEARTBEAT / 2:
            with contextlib.suppress(zmq.ZMQError):
                self._progress.took(int(frames[0].get(zmq.SRCFD)))
        return [frame.bytes for frame in frames]

    def _take(self, frames: list[bytes]) -> None:
        self.counters["messages_received"] += 1
        self.counters["bytes_received"] += sum(map(len, frames))
        self._received += len(frames[-1])
        handled(self.counters, self._dispatch, frames)
        if self._received - self._credited > CREDIT_STEP:
            self._announce_now = True

    def _dispatch(self, frames: list[bytes]) -> None:
        if len(frames) != 2:
            raise Malformed("a message that is not two frames")
        header, body = headers.decode_header(frames[0]), headers.check_body(frames[1])
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
        # A broker that names a new boot in every message must not make this peer send everything again each time.
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
        """Tells the handler of a newer roster, which came with a message or was read from the fleet's directory."""
        version = self._fleet.roster().version
        if version > self._roster_version:
            self._roster_version = version
            self._handler.on_roster()


def _why_silent(address: str) -> str:
    """What to look at if a broker does not answer, for messages: whether something listens there tells that."""
    try:
        if address.startswith("tcp://"):
            socket.create_connection(host_and_port(address), PROBE_TIMEOUT).close()
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PROBE_TIMEOUT)
                sock.connect(address.removeprefix("ipc://"))
    except OSError as error:
        return f": nothing can be reached there ({error.strerror or error}); is `lambda-split broker` running?"
    return (
        ", though something listens there: is it `lambda-split broker`, in this version or a later one, with the "
        "same keys, and is this member in its roster and not revoked?"
    )
