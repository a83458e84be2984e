"""The device's side of the queue: channels to workers, and the sessions that run over them."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from split_common import wire
from split_common.channel import CHANNEL_SESSIONS, Channel, DeviceHandshake, SessionKeys
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
    StepFailed,
)
from split_common.fleet import Fleet
from split_common.keys import Certificate, Identity, ModelScope, Role, verify_certificate
from split_common.transport import Transport, count_dropped, new_peer_id
from split_device.timings import Timings

#: Seconds without a reply after which a request is sent again; doubles each time.
RETRANSMIT = 3.0

#: The same for a message of a channel's set-up, which nobody needs long to answer.
SET_UP_RETRANSMIT = 1.0

#: Requests of one session that may be unanswered; further ones are sent as replies arrive.
IN_FLIGHT = 32

#: Least seconds before something is tried again, whatever a peer says.
MIN_RETRY = 0.1

#: Seconds that a device waits for room on a worker before it raises `Busy`.
PATIENCE = 60.0

#: What the transport's thread hands over: a message, or what became of the session.
#: Seconds for which a device that found no room elsewhere does not look again.
CROWDED_FOR = 2.0

Event = tuple[wire.AnyHeader, bytes] | SplitError


_T = TypeVar("_T")

_GONE = "the worker that held the session is gone"


@dataclass
class WorkerChannel:
    """A channel to one worker. Session 0 is the channel itself."""

    worker: bytes
    number: int
    channel: Channel
    control: SessionKeys
    sessions: Iterator[int] = field(default_factory=lambda: iter(range(1, CHANNEL_SESSIONS)))
    #: It has had as many sessions as it may.
    spent: bool = False


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
        #: Whether a worker of the service was ever found: then its absence may be a matter of time.
        self.served = False
        #: Messages dropped because they broke the protocol, by type of error.
        self.counters: Counter[str] = Counter()
        self._fleet = fleet
        self._identity = identity
        self._service = service
        self._model = model
        self._dtype: wire.Dtype = dtype
        self._id = new_peer_id(identity.certificate.name)
        # Joins a session to its channel. The garbage collector closes sessions in whichever thread it runs, perhaps
        # under this very lock: closing takes none, and what it removes from is copied before it is looked through.
        self._lock = threading.Lock()
        self._setting_up = threading.Lock()
        self._numbers = itertools.count(1)
        self._channels: dict[int, WorkerChannel] = {}
        # Until then, the workers that this device knows will do: no other one has room.
        self._crowded_until = 0.0
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
        self.on_roster()
        workers = list({channel.worker for channel in list(self._channels.values())})
        name = self._identity.certificate.name
        return wire.Announce(self._id, "device", name, watching=workers[: wire.MAX_WATCHED])

    def on_message(self, header: wire.AnyHeader, body: bytes) -> None:
        match header:
            case wire.Relay(kind=wire.Kind.ANSWER) | wire.Bounce(session=0):
                self._deliver(header, body)
            case wire.Relay(kind=wire.Kind.REPLY, session=0):
                if not self._deliver(header, body):
                    self._refused_unopened(header, body)
            case wire.Relay(kind=wire.Kind.REPLY) | wire.Bounce():
                session = self._sessions.get((header.channel, header.session))
                if session is not None and session.expects(header):
                    session.events.put((header, body))
            case wire.Relay(kind=wire.Kind.UNKNOWN):
                if not self._deliver(header, body):
                    self._channel_unknown(header, body)
            case _:
                raise Malformed(f"a device takes no {type(header).__name__}")

    def _deliver(self, header: wire.Relay | wire.Bounce, body: bytes) -> bool:
        """Hands a message to the set-up of its channel, if there is one."""
        events = self._answers.get(header.channel)
        if events is not None:
            events.put((header, body))
        return events is not None

    def _refused_unopened(self, header: wire.Relay, body: bytes) -> None:
        channel = self._channels.get(header.channel)
        if channel is None:
            return
        refusal, _ = wire.decode_payload(channel.control.open(header, body), wire.reply_decoder)
        if isinstance(refusal, wire.Refusal):
            session = self._sessions.get((header.channel, refusal.session))
            if session is not None and refusal.seq in session.in_flight:
                session.events.put(_refused(refusal))

    def _channel_unknown(self, header: wire.Relay, body: bytes) -> None:
        session = self._sessions.get((header.channel, header.session))
        request = session.in_flight.get(header.seq) if session is not None else None
        if session is None or request is None or body != wire.echo(*request):
            raise AuthenticationError("an unknown channel, of no request in flight")
        self._lose(lambda channel: channel is session.channel, SessionLost(_GONE))

    def on_gone(self, peers: Iterable[bytes]) -> None:
        gone = set(peers)
        self._lose(lambda channel: channel.worker in gone, SessionLost(_GONE))

    def _lose(self, which: Callable[[WorkerChannel], bool], error: SplitError) -> None:
        """Ends channels, and the sessions over them, whose worker does not have them any more or is not trusted."""
        for channel in [channel for channel in list(self._channels.values()) if which(channel)]:
            with self._lock:
                self._channels.pop(channel.number, None)
                lost = [session for session in list(self._sessions.values()) if session.channel is channel]
            for session in lost:
                session.lose(error)

    def on_reset(self) -> None:
        # Messages of a channel's set-up are sent again soon enough.
        for session in list(self._sessions.values()):
            session.resend()

    def on_roster(self) -> None:
        """Ends channels to workers that are revoked or whose certificate has run out; all, if this device is."""
        roster = self._fleet.roster()
        me = self._identity.certificate
        own = roster.by_sign_key(me.sign_key)
        if own is None or own.revoked:
            self._lose(lambda _: True, CertificateError(f"device {me.name!r} is revoked"))
        error = SessionLost("the worker that held the session is revoked, or its certificate has run out")
        self._lose(lambda channel: not channel.channel.trusted(roster), error)

    # --- channels and sessions -----------------------------------------------------------------------------

    def open_session(self, avoid: Sequence[bytes] = ()) -> RemoteSession:
        """A new session on some worker; the worker learns of it with the first request.

        Raises:
            NoWorker, Busy, BrokerUnreachable, AuthenticationError: there is none to be had.
        """
        while True:
            elsewhere = self._usable(avoid)
            if elsewhere is None and time.monotonic() < self._crowded_until:
                elsewhere = self._usable(())
            channel = elsewhere or self._set_up(avoid)
            session = self.new_session(channel)
            if session is not None:
                return session

    def new_session(self, channel: WorkerChannel) -> RemoteSession | None:
        """A session over this channel; None when the channel was lost or has had as many as it may."""
        with self._lock:
            if channel.number not in self._channels:
                return None
            number = next(channel.sessions, None)
            if number is None:
                channel.spent = True
                return None
            session = RemoteSession(self, channel, number)
            self._sessions[channel.number, number] = session
            return session

    def forget(self, session: RemoteSession) -> None:
        self._sessions.pop((session.channel.number, session.number), None)

    def _usable(self, avoid: Sequence[bytes]) -> WorkerChannel | None:
        """The newest channel to a worker that is not to be avoided."""
        for channel in reversed(list(self._channels.values())):
            if not channel.spent and not channel.channel.expired and channel.worker not in avoid:
                return channel
        return None

    def _set_up(self, avoid: Sequence[bytes]) -> WorkerChannel:
        deadline = time.monotonic() + self.patience
        distrusted: dict[bytes, CertificateError] = {}
        with self._setting_up:
            while True:
                # Another thread may have set one up meanwhile; and one to a worker that was full may do after all.
                if (channel := self._usable(avoid)) is not None:
                    return channel
                known = len(distrusted)
                try:
                    return self._shake_hands([*avoid, *distrusted], distrusted)
                except (Busy, NoWorker) as error:
                    if len(distrusted) > known:
                        continue
                    # No worker is left but those of a wrong certificate.
                    if distrusted:
                        raise next(iter(distrusted.values())) from None
                    if isinstance(error, Busy) and (channel := self._usable(())) is not None:
                        self._crowded_until = time.monotonic() + CROWDED_FOR
                        return channel
                    if isinstance(error, NoWorker) or time.monotonic() + error.retry_after > deadline:
                        raise
                    time.sleep(error.retry_after)
                    avoid = ()

    def _shake_hands(self, avoid: Sequence[bytes], distrusted: dict[bytes, CertificateError]) -> WorkerChannel:
        """Sets up a channel. Each message is sent until it is answered, in case that it or the answer was lost.

        Raises:
            Busy: no worker has room, or none answered: try again.
            NoWorker, BrokerUnreachable, AuthenticationError
        """
        self._verify(self._identity.certificate_bytes, "device")
        number = next(self._numbers)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._answers[number] = events
        try:
            handshake = DeviceHandshake(self._identity, self._verify, self._service, self._dtype)
            wish = wire.Open(self._id, number, self._service, list(avoid)[:64])

            def take_answer(header: wire.Relay, body: bytes) -> tuple[bytes, WorkerChannel] | None:
                if header.kind != wire.Kind.ANSWER or header.sender in distrusted:
                    return None
                try:
                    finish, channel = handshake.finish(body)
                except CertificateError as error:
                    # Authentic, so it is final for this worker; another one may do.
                    distrusted[header.sender] = error
                    raise Busy("the worker's certificate will not do", retry_after=0.0) from None
                return finish, WorkerChannel(header.sender, number, channel, channel.session_keys(0, 0))

            def take_confirmation(header: wire.Relay, body: bytes) -> bool | None:
                if header.sender != made.worker or header.kind == wire.Kind.ANSWER:
                    return None
                if header.kind == wire.Kind.UNKNOWN and body == wire.echo(last, finish):
                    raise Busy("the worker did not accept this device", retry_after=0.5)
                wire.decode_payload(made.control.open(header, body), wire.reply_decoder)
                return True

            finish, made = self._ask(events, wish, handshake.hello, take_answer)
            last = wire.Relay(made.worker, self._id, wire.Kind.FINISH, number)
            self._ask(events, last, finish, take_confirmation)
            self._channels[number] = made
            self.served = True
        finally:
            del self._answers[number]
        in_use = {session.channel.number for session in list(self._sessions.values())}
        for old in list(self._channels.values()):
            if (old.spent or old.channel.expired) and old.number not in in_use:
                self._channels.pop(old.number, None)
        # The broker is told at once that this device wants to hear of the worker's death.
        self.transport.announce()
        return made

    def _ask(
        self,
        events: queue.SimpleQueue[Event],
        request: wire.Open | wire.Relay,
        body: bytes,
        take: Callable[[wire.Relay, bytes], _T | None],
    ) -> _T:
        """Sends a message of a set-up until `take` makes something of an answer; others are dropped."""
        deadline = time.monotonic() + self.timeout
        interval, send_at = SET_UP_RETRANSMIT, 0.0
        while True:
            now = time.monotonic()
            if now >= deadline:
                if not self.transport.alive:
                    raise BrokerUnreachable("the broker does not answer any more")
                raise Busy("no worker answered in time", retry_after=0.5)
            if now >= send_at:
                self.transport.send(request, body)
                interval, send_at = 2 * interval, now + interval
            try:
                event = events.get(timeout=max(0.0, min(send_at, deadline) - now))
            except queue.Empty:
                continue
            assert not isinstance(event, SplitError)
            if isinstance(event[0], wire.Bounce):
                send_at = time.monotonic() + self._bounced(event[0])
            else:
                assert isinstance(event[0], wire.Relay)
                try:
                    taken = take(event[0], event[1])
                except (ProtocolError, AuthenticationError) as error:
                    self.count(error)
                    continue
                if taken is not None:
                    return taken

    def _bounced(self, bounce: wire.Bounce) -> float:
        """Seconds until a message of a set-up should be sent again."""
        match bounce.reason:
            case "full":
                return max(MIN_RETRY, bounce.retry_after)
            case "no-worker":
                wanted = f"{self._model} layers {self._service.first}:{self._service.last}"
                served = _printable(bounce.detail) or "none"
                command = f"lambda-split worker --layers {self._service.first}:{self._service.last}"
                raise NoWorker(
                    f"no worker serves {wanted} with these weights (served here: {served}): start one with "
                    f"`{command}` and the same --model",
                    served,
                )
            case "busy":
                raise Busy(_printable(bounce.detail) or "every worker is full", max(MIN_RETRY, bounce.retry_after))
            case _:
                raise Busy("the worker went away", retry_after=MIN_RETRY)

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
        count_dropped(self.counters, error)

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
        #: Requests that were sent and not answered, by sequence number.
        self.in_flight: dict[int, tuple[wire.Relay, bytes]] = {}
        self._lost: SplitError | None = None

    @property
    def acked(self) -> int:
        """All replies below this sequence number have arrived."""
        return min(list(self.in_flight), default=self._seq)

    def expects(self, header: wire.Relay | wire.Bounce) -> bool:
        """Whether a message may be about a request in flight."""
        from_worker = not isinstance(header, wire.Relay) or header.sender == self.worker
        return from_worker and header.seq in self.in_flight

    def call(
        self, requests: Sequence[tuple[wire.Payload, memoryview | bytes]]
    ) -> list[tuple[wire.AnyReply, memoryview]]:
        """Sends requests, several ahead, and waits for the reply of each.

        Raises:
            SessionLost: the worker is gone or does not hold the session any more.
            Busy, NonFinite, Malformed, PromptTooLong: the worker refused a request.
            BrokerUnreachable: the broker has been silent for the client's timeout.
        """
        if self._lost is not None:
            raise self._lost
        first = self._seq
        waiting = deque(requests)
        replies: dict[int, tuple[wire.AnyReply, memoryview]] = {}
        try:
            while len(replies) < len(requests):
                while waiting and len(self.in_flight) < IN_FLIGHT:
                    self._send(*waiting.popleft())
                header, body = self._next_event()
                try:
                    reply, tensor = self._open_reply(header, body)
                except AuthenticationError as error:
                    self._client.count(error)
                    continue
                replies[header.seq - first] = reply, tensor
                if isinstance(reply, wire.Refusal) and isinstance(refused := _refused(reply), SessionLost):
                    raise refused
        except BaseException as error:
            self._end(error)
            raise
        answers = [replies[i] for i in range(len(requests))]
        for (request, _), (reply, _) in zip(requests, answers, strict=True):
            if isinstance(reply, wire.Refusal):
                raise _refused(reply)
            if not isinstance(reply, wire.Result if isinstance(request, wire.Step) else wire.Done):
                wrong = SessionLost(f"the worker answered a {type(request).__name__} by a {type(reply).__name__}")
                self._end(wrong)
                raise wrong
        return answers

    def fork(self) -> RemoteSession:
        """A copy of the session on its worker. Raises what `call` raises."""
        if self._lost is not None:
            raise self._lost
        child = self._client.new_session(self.channel)
        if child is None:
            raise SessionLost("the channel to the worker takes no more sessions")
        try:
            child.call([(wire.Fork(self.number, 0), b"")])
        except SplitError:
            child.close()
            raise
        return child

    @property
    def ended(self) -> bool:
        """Whether the session can take no more requests."""
        return self._lost is not None

    def close(self) -> None:
        """Frees the session on its worker; not waited for. The garbage collector may call it, in any thread."""
        if self._lost is None:
            self._end(SessionLost("the session was closed"))

    def lose(self, error: SplitError) -> None:
        """The worker does not hold the session any more, or must not be written to: there is nothing to free."""
        if self._lost is None:
            self._lost = error
            self._client.forget(self)
            self.events.put(error)

    def resend(self) -> None:
        """Sends again what has not been answered."""
        for frames in list(self.in_flight.values()):
            self._client.transport.send(*frames)

    def _end(self, error: BaseException) -> None:
        """Expects nothing more, and frees the session on its worker, which may hold it even after a refusal."""
        if self._lost is None:
            self._lost = error if isinstance(error, SessionLost) else SessionLost("the session was closed")
            self._send(wire.Close(), b"")
        self.in_flight.clear()
        self._client.forget(self)

    def _send(self, payload: wire.Payload, tensor: memoryview | bytes) -> None:
        with self._client.timings.measure("encrypt"):
            if isinstance(payload, wire.Step):
                payload = msgspec.structs.replace(payload, acked=self.acked)
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
        self.in_flight[self._seq] = frames
        self._seq += 1
        self._client.transport.send(*frames)

    def _next_event(self) -> tuple[wire.Relay, bytes]:
        """The next reply to a request in flight; sends the requests again when it takes long."""
        silent_since: float | None = None
        interval = RETRANSMIT
        resend_at = time.monotonic() + interval
        while True:
            now = time.monotonic()
            silent_since = None if self._client.transport.alive else silent_since or now
            if silent_since is not None and now - silent_since > self._client.timeout:
                raise BrokerUnreachable("the broker does not answer any more")
            if now >= resend_at:
                self.resend()
                interval *= 2
                resend_at = now + interval
            try:
                event = self.events.get(timeout=min(0.25, resend_at - now))
            except queue.Empty:
                continue
            if isinstance(event, SplitError):
                raise event
            header, body = event
            assert isinstance(header, wire.Bounce | wire.Relay)
            if header.seq not in self.in_flight:
                continue
            if isinstance(header, wire.Bounce):
                if header.reason in ("gone", "revoked"):
                    raise SessionLost(_GONE)
                # One of several, perhaps: all are sent again at once.
                resend_at = min(resend_at, now + max(MIN_RETRY, header.retry_after))
            else:
                return header, body

    def _open_reply(self, header: wire.Relay, body: bytes) -> tuple[wire.AnyReply, memoryview]:
        with self._client.timings.measure("decrypt"):
            reply, tensor = wire.decode_payload(self._keys.open(header, body), wire.reply_decoder)
        del self.in_flight[header.seq]
        return reply, tensor


def _refused(refusal: wire.Refusal) -> SplitError:
    message = f"the worker refused: {_printable(refusal.message)}"
    match refusal.reason:
        case "busy":
            return Busy(message, max(MIN_RETRY, refusal.retry_after))
        case "non-finite":
            return NonFinite(message)
        case "malformed":
            return Malformed(message)
        case "too-long":
            return PromptTooLong(message)
        case "failed":
            return StepFailed(message)
        case _:
            return SessionLost(message)


def _printable(text: str) -> str:
    """What a peer said, fit for a terminal."""
    return "".join(character for character in text if character.isprintable())
