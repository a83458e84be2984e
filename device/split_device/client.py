"""The device's side of the queue: channels to workers, and the sessions that run over them."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from split_common import wire
from split_common.channel import Channel, DeviceHandshake, SessionKeys
from split_common.errors import (
    AuthenticationError,
    BrokerUnreachable,
    Busy,
    CertificateError,
    Malformed,
    NonFinite,
    NoWorker,
    PromptTooLong,
    ProtocolError,
    SessionLost,
    SplitError,
)
from split_common.fleet import Fleet
from split_common.keys import Certificate, Identity, ModelScope, Role, verify_certificate
from split_common.transport import Transport, new_peer_id
from split_device.timings import Timings

log = logging.getLogger(__name__)

#: Seconds without a reply after which a request is sent again; doubles each time.
RETRANSMIT = 3.0

#: Seconds that a device waits for room on a worker before it raises `Busy`.
PATIENCE = 60.0

Event = tuple[wire.AnyHeader, bytes] | SplitError


@dataclass
class WorkerChannel:
    """A channel to one worker. Session 0 is the channel itself."""

    worker: bytes
    number: int
    channel: Channel
    control: SessionKeys
    sessions: Iterable[int]


class Client:
    """A device's connection: finds workers of one service and opens sessions (a transport's `Handler`).

    Args:
        transport: the queue, not started yet.
        fleet, identity: whom the device trusts, and who it is.
        service: the body that it needs.
        model: the model's name, for error messages.
        dtype: of the hidden states that it computes.
        timeout: seconds to wait for the broker, and for the answer to a channel's set-up.
        patience: seconds to wait for room on a worker.
    """

    def __init__(
        self,
        transport: Transport,
        fleet: Fleet,
        identity: Identity,
        service: wire.Service,
        model: str,
        dtype: wire.Dtype,
        timeout: float = 10.0,
        patience: float = PATIENCE,
    ) -> None:
        self.transport = transport
        self.timeout = timeout
        self.patience = patience
        self.timings = Timings()
        #: Messages dropped because they broke the protocol, by type of error.
        self.counters: Counter[str] = Counter()
        self._fleet = fleet
        self._identity = identity
        self._service = service
        self._model = model
        self._dtype: wire.Dtype = dtype
        self._id = new_peer_id()
        self._lock = threading.Lock()
        self._setting_up = threading.Lock()
        self._numbers = itertools.count(1)
        self._channels: dict[int, WorkerChannel] = {}
        self._answers: dict[int, queue.SimpleQueue[Event]] = {}
        self._sessions: dict[tuple[int, int], RemoteSession] = {}

    def __deepcopy__(self, memo: object) -> Client:
        return self

    def start(self) -> None:
        """Raises BrokerUnreachable."""
        self.transport.start(self, self.timeout)

    def close(self) -> None:
        self.transport.close()

    # --- the transport's thread ----------------------------------------------------------------------------

    def announcement(self) -> wire.Announce:
        with self._lock:
            workers = list({channel.worker for channel in self._channels.values()})
        name = self._identity.certificate.name
        return wire.Announce(self._id, "device", name, watching=workers[: wire.MAX_WATCHED])

    def on_message(self, header: wire.AnyHeader, body: bytes) -> None:
        match header:
            case wire.Relay(kind=wire.Kind.ANSWER):
                self._deliver(self._answers.get(header.channel), header, body)
            case wire.Relay(kind=wire.Kind.REPLY, session=0):
                self._refused_unopened(header, body)
            case wire.Relay(kind=wire.Kind.REPLY):
                session = self._sessions.get((header.channel, header.session))
                if session is not None and session.worker == header.sender:
                    self._deliver(session.events, header, body)
            case wire.Bounce(session=0):
                self._deliver(self._answers.get(header.channel), header, body)
            case wire.Bounce():
                session = self._sessions.get((header.channel, header.session))
                self._deliver(session.events if session is not None else None, header, body)
            case _:
                raise Malformed(f"a device takes no {type(header).__name__}")

    @staticmethod
    def _deliver(events: queue.SimpleQueue[Event] | None, header: wire.AnyHeader, body: bytes) -> None:
        if events is not None:
            events.put((header, body))

    def _refused_unopened(self, header: wire.Relay, body: bytes) -> None:
        channel = self._channels.get(header.channel)
        if channel is None:
            return
        refusal, _ = wire.decode_payload(channel.control.open(header, body), wire.reply_decoder)
        if isinstance(refusal, wire.Refusal):
            session = self._sessions.get((header.channel, refusal.session))
            if session is not None:
                session.events.put(_refused(refusal))

    def on_gone(self, peers: Iterable[bytes]) -> None:
        gone = set(peers)
        with self._lock:
            for number in [n for n, channel in self._channels.items() if channel.worker in gone]:
                del self._channels[number]
            lost = [session for session in self._sessions.values() if session.worker in gone]
        for session in lost:
            session.events.put(SessionLost("the worker that held the session is gone"))

    def on_reset(self) -> None:
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.resend()

    def on_roster(self) -> None:
        roster = self._fleet.roster()
        with self._lock:
            workers = {channel.worker: channel.channel.peer.name for channel in self._channels.values()}
        revoked = [
            worker for worker, name in workers.items() if (member := roster.by_name(name)) is None or member.revoked
        ]
        if revoked:
            self.on_gone(revoked)

    # --- channels and sessions -----------------------------------------------------------------------------

    def open_session(self, avoid: Sequence[bytes] = ()) -> RemoteSession:
        """A new session on some worker; the worker learns of it with the first request.

        Raises:
            NoWorker, Busy, BrokerUnreachable, AuthenticationError: there is none to be had.
        """
        channel = self._channel(avoid)
        with self._lock:
            session = RemoteSession(self, channel, next(iter(channel.sessions)))
            self._sessions[channel.number, session.number] = session
        return session

    def forget(self, session: RemoteSession) -> None:
        with self._lock:
            self._sessions.pop((session.channel.number, session.number), None)

    def _channel(self, avoid: Sequence[bytes]) -> WorkerChannel:
        with self._setting_up:
            with self._lock:
                usable = [
                    channel
                    for channel in self._channels.values()
                    if not channel.channel.expired and channel.worker not in avoid
                ]
            return usable[-1] if usable else self._set_up(avoid)

    def _set_up(self, avoid: Sequence[bytes]) -> WorkerChannel:
        deadline = time.monotonic() + self.patience
        while True:
            number = next(self._numbers)
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            self._answers[number] = events
            try:
                return self._shake_hands(number, events, avoid)
            except Busy as busy:
                if time.monotonic() + busy.retry_after > deadline:
                    raise
                time.sleep(busy.retry_after)
                avoid = ()
            finally:
                del self._answers[number]

    def _shake_hands(self, number: int, events: queue.SimpleQueue[Event], avoid: Sequence[bytes]) -> WorkerChannel:
        handshake = DeviceHandshake(self._identity, self._verify, self._service, self._dtype)
        self.transport.send(wire.Open(self._id, number, self._service, list(avoid)[:64]), handshake.hello)
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                event = events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if not self.transport.alive:
                    raise BrokerUnreachable("the broker does not answer any more") from None
                raise Busy("no worker answered in time", retry_after=0.5) from None
            assert not isinstance(event, SplitError)
            header, body = event
            if isinstance(header, wire.Bounce):
                raise self._unopened(header)
            assert isinstance(header, wire.Relay)
            try:
                finish, channel = handshake.finish(body)
            except (ProtocolError, AuthenticationError) as error:
                self.count(error)
                # Bytes that anybody may have sent are dropped; an authentic certificate that will not do is final.
                if isinstance(error, CertificateError):
                    raise
                continue
            break
        made = WorkerChannel(header.sender, number, channel, channel.session_keys(0, 0), itertools.count(1))
        with self._lock:
            self._channels[number] = made
        self.transport.send(wire.Relay(header.sender, self._id, wire.Kind.FINISH, number), finish)
        self.transport.announce()
        return made

    def _unopened(self, bounce: wire.Bounce) -> SplitError:
        if bounce.reason == "no-worker":
            wanted = f"{self._model} layers {self._service.first}:{self._service.last}"
            return NoWorker(
                f"no worker serves {wanted} with these weights; served here: {bounce.detail or 'none'}. "
                f"Start one: lambda-split worker --model {self._model} "
                f"--layers {self._service.first}:{self._service.last}",
                bounce.detail,
            )
        return Busy(bounce.detail or "every worker is full", bounce.retry_after or 1.0)

    def _verify(self, certificate: bytes, role: Role) -> Certificate:
        scope = ModelScope(self._service.root, self._service.first, self._service.last)
        return verify_certificate(
            certificate,
            operator_key=self._fleet.operator_key,
            roster=self._fleet.roster(),
            role=role,
            scope=scope,
        )

    def count(self, error: SplitError) -> None:
        """Notes a message that was dropped."""
        self.counters[type(error).__name__] += 1
        log.warning("dropped a message: %s", error)

    @property
    def id(self) -> bytes:
        return self._id


class RemoteSession:
    """One session on one worker. Requests are answered in order; a lost one is sent again, byte for byte.

    Not thread-safe: a session belongs to one generation.
    """

    def __init__(self, client: Client, channel: WorkerChannel, number: int) -> None:
        self.channel = channel
        self.worker = channel.worker
        self.number = number
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._client = client
        self._keys = channel.channel.session_keys(number, 0)
        self._seq = 0
        self._in_flight: dict[int, tuple[wire.Relay, bytes]] = {}
        self._lost: SessionLost | None = None

    @property
    def acked(self) -> int:
        """All replies below this sequence number have arrived."""
        return min(self._in_flight, default=self._seq)

    def call(
        self, requests: Sequence[tuple[wire.Payload, memoryview | bytes]]
    ) -> list[tuple[wire.AnyReply, memoryview]]:
        """Sends requests at once and waits for the reply of each.

        Raises:
            SessionLost: the worker is gone or does not hold the session any more.
            Busy, NonFinite, Malformed, PromptTooLong: the worker refused a request.
            BrokerUnreachable: the broker has been silent for the client's timeout.
        """
        if self._lost is not None:
            raise self._lost
        first = self._seq
        try:
            for payload, tensor in requests:
                self._send(payload, tensor)
            replies: dict[int, tuple[wire.AnyReply, memoryview]] = {}
            while len(replies) < len(requests):
                header, body = self._next_event()
                try:
                    replies[header.seq - first] = self._open_reply(header, body)
                except AuthenticationError as error:
                    self._client.count(error)
        except BaseException as error:
            self._end(error)
            raise
        answers = [replies[i] for i in range(len(requests))]
        for reply, _ in answers:
            if isinstance(reply, wire.Refusal):
                raise _refused(reply)
        return answers

    def fork(self) -> RemoteSession:
        """A copy of the session on its worker. Raises what `call` raises."""
        client = self._client
        with client._lock:
            child = RemoteSession(client, self.channel, next(iter(self.channel.sessions)))
            client._sessions[self.channel.number, child.number] = child
        child.call([(wire.Fork(self.number, 0), b"")])
        return child

    @property
    def ended(self) -> bool:
        """Whether the session can take no more requests."""
        return self._lost is not None

    def close(self) -> None:
        """Frees the session on its worker; not waited for."""
        if self._lost is None:
            self._send(wire.Close(), b"")
            self._end(SessionLost("the session was closed"))

    def resend(self) -> None:
        """Sends again what has not been answered."""
        for frames in list(self._in_flight.values()):
            self._client.transport.send(*frames)

    def _end(self, error: BaseException) -> None:
        """Expects nothing more; a session that was not lost by the worker is freed there."""
        if not isinstance(error, SessionLost | Busy):
            self._send(wire.Close(), b"")
        self._lost = error if isinstance(error, SessionLost) else SessionLost("the session was closed")
        self._in_flight.clear()
        self._client.forget(self)

    def _send(self, payload: wire.Payload, tensor: memoryview | bytes) -> None:
        with self._client.timings.measure("encrypt"):
            header = wire.Relay(
                self.worker,
                self._client.id,
                wire.Kind.REQUEST,
                self.channel.number,
                self.number,
                0,
                self._seq,
                self._keys.next_counter(),
            )
            plaintext = wire.encode_payload(payload, tensor, overhead=self._keys.tag_size)
            frames = header, self._keys.seal(header, plaintext)
        self._in_flight[self._seq] = frames
        self._seq += 1
        self._client.transport.send(*frames)

    def _next_event(self) -> tuple[wire.Relay, bytes]:
        """The next reply to a request in flight."""
        silent_since: float | None = None
        interval = RETRANSMIT
        resend_at = time.monotonic() + interval
        while True:
            try:
                event = self.events.get(timeout=0.25)
            except queue.Empty:
                now = time.monotonic()
                silent_since = None if self._client.transport.alive else silent_since or now
                if silent_since is not None and now - silent_since > self._client.timeout:
                    raise BrokerUnreachable("the broker does not answer any more") from None
                if now >= resend_at:
                    interval *= 2
                    resend_at = now + interval
                    self.resend()
                continue
            if isinstance(event, SplitError):
                raise event
            header, body = event
            if isinstance(header, wire.Bounce):
                if header.reason in ("gone", "revoked"):
                    raise SessionLost("the worker that held the session is gone")
                time.sleep(min(header.retry_after, 1.0))
                self.resend()
            elif isinstance(header, wire.Relay) and header.seq in self._in_flight:
                return header, body

    def _open_reply(self, header: wire.Relay, body: bytes) -> tuple[wire.AnyReply, memoryview]:
        with self._client.timings.measure("decrypt"):
            reply, tensor = wire.decode_payload(self._keys.open(header, body), wire.reply_decoder)
        del self._in_flight[header.seq]
        return reply, tensor


def _refused(refusal: wire.Refusal) -> SplitError:
    message = f"the worker refused: {refusal.message}"
    match refusal.reason:
        case "busy":
            return Busy(message, refusal.retry_after or 1.0)
        case "non-finite":
            return NonFinite(message)
        case "malformed":
            return Malformed(message)
        case "too-long":
            return PromptTooLong(message)
        case _:
            return SessionLost(message)
