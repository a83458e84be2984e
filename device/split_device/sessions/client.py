"""The device's connection to the queue: finds workers, and sets up channels to them."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from split_common.errors import (
    AuthenticationError,
    BrokerUnreachable,
    Busy,
    CertificateError,
    Malformed,
    NoWorker,
    ProtocolError,
    SessionLost,
    SplitError,
    WorkerGone,
)
from split_common.protocol import headers, payloads
from split_common.protocol.handshake import DeviceHandshake
from split_common.transport import Transport, count_dropped, new_peer_id
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, Identity, ModelScope, Role
from split_device.sessions.connection import HISTORY_MEMORY, PATIENCE, STEP_TIMEOUT, TIMEOUT
from split_device.sessions.session import (
    CHECK_INTERVAL,
    GONE,
    MIN_RETRY,
    Event,
    RemoteSession,
    WorkerChannel,
    printable,
    refusal_error,
)
from split_device.sessions.timings import Timings

#: Seconds until a message of a channel's set-up is sent again; doubles each time. Answers take little time.
SET_UP_RETRANSMIT = 1.0

#: Seconds for which a device that found no room elsewhere does not look again.
CROWDED_FOR = 2.0

#: Error message: the device was closed meanwhile.
LEFT = "this device has left the queue"

#: Raises an error once the session that is being opened was abandoned.
Check = Callable[[], None]

_T = TypeVar("_T")


class Client:
    """A device's connection: finds workers of one service and opens sessions (a transport's `Handler`).

    Args:
        transport: the queue, not started yet.
        fleet, identity: the members that the device trusts, and its own keys.
        service: the body that it needs.
        model: the model's name, for error messages.
        dtype: of the hidden states that it computes.
        timeout: seconds to wait for the broker, and for the answer to a channel's set-up.
        patience: seconds that sessions wait for room on a worker.
        step_timeout: seconds without a reply after which a worker is too slow, if another one is available.
        history_memory: bytes of each session's history that stay in memory.
        cut: how `lambda-split worker` is told the body, for error messages; None for `--layers FIRST:LAST`.
    """

    def __init__(
        self,
        transport: Transport,
        fleet: Fleet,
        identity: Identity,
        service: headers.Service,
        model: str,
        dtype: payloads.Dtype,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        history_memory: int = HISTORY_MEMORY,
        step_timeout: float = STEP_TIMEOUT,
        cut: str | None = None,
    ) -> None:
        self.transport = transport
        self.timeout = timeout
        self.patience = patience
        self.history_memory = history_memory
        self.step_timeout = step_timeout
        self.timings = Timings()
        #: Whether a worker of the service was ever found: if so, one that is missing may come back.
        self.served = False
        #: Messages dropped because they broke the protocol, by type of error.
        self.counters: Counter[str] = Counter()
        self._fleet = fleet
        self._identity = identity
        self.service = service
        self.model = model
        self._cut = cut or f"--layers {service.first}:{service.last}"
        self._dtype: payloads.Dtype = dtype
        self.id = new_peer_id(identity.certificate.name)
        # Joins a session to its channel. The garbage collector closes sessions in whichever thread it runs, perhaps
        # under this very lock: closing takes none, and what it removes from is copied before it is looked through.
        self._lock = threading.Lock()
        self._setting_up = threading.Lock()
        self._numbers = itertools.count(1)
        self._session_numbers = itertools.count(1)
        self._channels: dict[int, WorkerChannel] = {}
        # Until then, the workers that this device knows will do: no other one has room.
        self._crowded_until = 0.0
        self._answers: dict[int, queue.SimpleQueue[Event]] = {}
        self._sessions: dict[tuple[int, int], RemoteSession] = {}
        self._closed = False

    def __deepcopy__(self, memo: object) -> Client:
        return self

    def start(self) -> None:
        """Raises BrokerUnreachable."""
        self.transport.start(self, self.timeout)

    def close(self) -> None:
        """Leaves the queue; workers free this device's sessions. All but the first call do nothing."""
        if self._closed:
            return
        self._closed = True
        for events in list(self._answers.values()):
            events.put(BrokerUnreachable(LEFT))
        self.transport.close()

    # --- the transport's thread ----------------------------------------------------------------------------

    def announcement(self) -> headers.Announce:
        self.on_roster()
        workers = list({channel.worker for channel in list(self._channels.values())})
        name = self._identity.certificate.name
        return headers.Announce(self.id, "device", name, watching=workers[: headers.MAX_WATCHED])

    def on_message(self, header: headers.AnyHeader, body: bytes) -> None:
        match header:
            case headers.Relay(kind=headers.RelayKind.ANSWER) | headers.Bounce(session=0):
                self._deliver(header, body)
            case headers.Relay(kind=headers.RelayKind.REPLY, session=0):
                if not self._deliver(header, body):
                    self._refused_unopened(header, body)
            case headers.Relay(kind=headers.RelayKind.REPLY) | headers.Bounce():
                session = self._sessions.get((header.channel, header.session))
                if session is not None and session.expects(header):
                    session.events.put((header, body))
                else:
                    # A repetition, or of an earlier epoch, e.g. from a worker that was taken for dead.
                    self.counters["late"] += 1
            case headers.Relay(kind=headers.RelayKind.UNKNOWN):
                if not self._deliver(header, body):
                    self._channel_unknown(header, body)
            case _:
                raise Malformed(f"a device takes no {type(header).__name__}")

    def _deliver(self, header: headers.Relay | headers.Bounce, body: bytes) -> bool:
        """Hands a message to the set-up of its channel, if there is one."""
        events = self._answers.get(header.channel)
        if events is not None:
            events.put((header, body))
        return events is not None

    def _refused_unopened(self, header: headers.Relay, body: bytes) -> None:
        channel = self._channels.get(header.channel)
        if channel is None:
            return
        refusal, _ = payloads.decode_payload(channel.control.open(header, body), payloads.reply_decoder)
        if isinstance(refusal, payloads.Refusal):
            session = self._sessions.get((header.channel, refusal.session))
            if session is None or session.epoch != refusal.epoch or refusal.seq not in session.in_flight:
                self.counters["late"] += 1
            elif refusal.reason == "full":
                again = headers.Bounce("full", seq=refusal.seq, retry_after=refusal.retry_after)
                session.events.put((again, b""))
            else:
                session.events.put(refusal_error(refusal))

    def _channel_unknown(self, header: headers.Relay, body: bytes) -> None:
        session = self._sessions.get((header.channel, header.session))
        request = session.in_flight.get(header.seq) if session is not None else None
        if session is None or request is None or body != headers.echo(*request):
            raise AuthenticationError("an unknown channel, of no request in flight")
        self._lose(lambda channel: channel is session.channel)

    def on_gone(self, peers: Iterable[bytes]) -> None:
        gone = set(peers)
        self._lose(lambda channel: channel.worker in gone)

    def _lose(self, which: Callable[[WorkerChannel], bool], error: SplitError | None = None) -> None:
        """Ends channels and the sessions over them: their worker is gone, or `error` says what is wrong with it."""
        for channel in [channel for channel in list(self._channels.values()) if which(channel)]:
            with self._lock:
                self._channels.pop(channel.number, None)
                lost = [session for session in list(self._sessions.values()) if session.channel is channel]
            held = sum(bool(session.in_flight) for session in lost)
            for session in lost:
                session.lose(error or WorkerGone(GONE, max(1, held)))

    def on_reset(self) -> None:
        # Messages of a channel's set-up are sent again soon anyway.
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
        self._lose(lambda channel: not channel.trusted(roster), error)

    # --- channels and sessions -----------------------------------------------------------------------------

    def new_number(self) -> int:
        """A number for a session, which it keeps on all its workers."""
        return next(self._session_numbers)

    def open_session(
        self, avoid: Sequence[bytes] = (), number: int | None = None, epoch: int = 0, check: Check = lambda: None
    ) -> RemoteSession:
        """An epoch of a session on some worker, which learns of it by the first request.

        Args:
            avoid: workers that are taken only if there is no other one.
            number: the session's; None for a new one.
            epoch: higher than all earlier ones of this session; its worker forgets lower ones.
            check: called repeatedly meanwhile; what it raises ends the search.

        Raises:
            NoWorker: no worker serves the body.
            Busy: all workers are full, or none answered in time.
            BrokerUnreachable: the broker does not answer, or the client was closed.
            AuthenticationError: only workers that this device does not trust are left, or it has no valid
                certificate itself.
        """
        number = number if number is not None else self.new_number()
        while True:
            elsewhere = self._usable(avoid)
            if elsewhere is None and time.monotonic() < self._crowded_until:
                elsewhere = self._usable(())
            channel = elsewhere or self._set_up(avoid, check)
            session = self.new_session(channel, number, epoch)
            if session is not None:
                return session

    def has_other(self, worker: bytes) -> bool:
        """Whether another worker is available. Sets up a channel to it, unless another thread is setting one up."""
        if self._usable([worker]) is not None:
            return True
        if not self._setting_up.acquire(blocking=False):
            return False
        try:
            self._shake_hands([worker], {}, lambda: None)
            return True
        except SplitError:
            return False
        finally:
            self._setting_up.release()

    def new_session(self, channel: WorkerChannel, number: int, epoch: int) -> RemoteSession | None:
        """A session over this channel; None if the channel was lost or takes no more of them."""
        with self._lock:
            if channel.number not in self._channels or not channel.sessions_left:
                return None
            channel.sessions_left -= 1
            session = RemoteSession(self, channel, number, epoch)
            self._sessions[channel.number, number] = session
            return session

    def forget(self, session: RemoteSession) -> None:
        key = session.channel.number, session.number
        if self._sessions.get(key) is session:
            del self._sessions[key]

    def _usable(self, avoid: Sequence[bytes]) -> WorkerChannel | None:
        """The newest channel to a worker that is not to be avoided."""
        for channel in reversed(list(self._channels.values())):
            if channel.usable and channel.worker not in avoid:
                return channel
        return None

    def _set_up(self, avoid: Sequence[bytes], check: Check) -> WorkerChannel:
        distrusted: dict[bytes, CertificateError] = {}
        with self._setting_up:
            while True:
                # Another thread may have set one up meanwhile; and a worker that was full may have room again.
                if (channel := self._usable(avoid)) is not None:
                    return channel
                known = len(distrusted)
                try:
                    return self._shake_hands([*avoid, *distrusted], distrusted, check)
                except (Busy, NoWorker) as error:
                    if len(distrusted) > known:
                        continue
                    # No worker is left but those of a wrong certificate.
                    if distrusted:
                        raise next(iter(distrusted.values())) from None
                    if isinstance(error, Busy) and (channel := self._usable(())) is not None:
                        self._crowded_until = time.monotonic() + CROWDED_FOR
                        return channel
                    raise

    def _shake_hands(
        self, avoid: Sequence[bytes], distrusted: dict[bytes, CertificateError], check: Check
    ) -> WorkerChannel:
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
            handshake = DeviceHandshake(self._identity, self._verify, self.service, self._dtype)
            open_header = headers.Open(self.id, number, self.service, list(avoid)[:64])

            def take_answer(header: headers.Relay, body: bytes) -> tuple[bytes, WorkerChannel] | None:
                if header.kind != headers.RelayKind.ANSWER or header.sender in distrusted:
                    return None
                try:
                    finish, channel = handshake.finish(body)
                except CertificateError as error:
                    # Authentic, so it is final for this worker; another one may do.
                    distrusted[header.sender] = error
                    raise Busy("the worker's certificate will not do", retry_after=0.0) from None
                return finish, WorkerChannel(header.sender, number, channel, channel.session_keys(0, 0))

            def take_confirmation(header: headers.Relay, body: bytes) -> bool | None:
                if header.sender != made.worker or header.kind == headers.RelayKind.ANSWER:
                    return None
                if header.kind == headers.RelayKind.UNKNOWN and body == headers.echo(last, finish):
                    raise Busy("the worker did not accept this device", retry_after=0.5)
                payloads.decode_payload(made.control.open(header, body), payloads.reply_decoder)
                return True

            finish, made = self._ask(events, open_header, handshake.hello, take_answer, check)
            last = headers.Relay(made.worker, self.id, headers.RelayKind.FINISH, number)
            self._ask(events, last, finish, take_confirmation, check)
            self._channels[number] = made
            self.served = True
        finally:
            del self._answers[number]
        in_use = {session.channel.number for session in list(self._sessions.values())}
        for old in list(self._channels.values()):
            if not old.usable and old.number not in in_use:
                self._channels.pop(old.number, None)
        # The broker is told at once that this device wants to hear of the worker's death.
        self.transport.announce()
        return made

    def _ask(
        self,
        events: queue.SimpleQueue[Event],
        request: headers.Open | headers.Relay,
        body: bytes,
        take: Callable[[headers.Relay, bytes], _T | None],
        check: Check,
    ) -> _T:
        """Sends a message of a set-up until `take` makes something of an answer; others are dropped."""
        deadline = time.monotonic() + self.timeout
        interval, send_at = SET_UP_RETRANSMIT, 0.0
        while True:
            check()
            now = time.monotonic()
            if self._closed:
                raise BrokerUnreachable(LEFT)
            if now >= deadline:
                if not self.transport.alive:
                    raise BrokerUnreachable("the broker does not answer any more")
                raise Busy("no worker answered in time", retry_after=0.5)
            if now >= send_at:
                self.transport.send(request, body)
                interval, send_at = 2 * interval, now + interval
            try:
                event = self.transport.receive(events, max(0.0, min(send_at - now, deadline - now, CHECK_INTERVAL)))
            except queue.Empty:
                continue
            if isinstance(event, SplitError):
                raise event
            if isinstance(event[0], headers.Bounce):
                send_at = time.monotonic() + self._bounced(event[0])
            else:
                assert isinstance(event[0], headers.Relay)
                try:
                    taken = take(event[0], event[1])
                except (ProtocolError, AuthenticationError) as error:
                    self.count(error)
                    continue
                if taken is not None:
                    return taken

    def _bounced(self, bounce: headers.Bounce) -> float:
        """Seconds until a message of a set-up should be sent again."""
        match bounce.reason:
            case "full":
                return max(MIN_RETRY, bounce.retry_after)
            case "no-worker":
                service, served = self.service, printable(bounce.detail) or "none"
                raise NoWorker(
                    f"no worker serves {self.model} layers {service.first}:{service.last} with these weights "
                    f"(served here: {served}): start one with `lambda-split worker {self._cut}` and the same "
                    "--model",
                    served,
                )
            case "busy":
                raise Busy(printable(bounce.detail) or "every worker is full", max(MIN_RETRY, bounce.retry_after))
            case _:
                raise Busy("the worker went away", retry_after=MIN_RETRY)

    def _verify(self, certificate: bytes, role: Role) -> Certificate:
        scope = ModelScope(self.service.root, self.service.first, self.service.last)
        return self._fleet.verify(certificate, role, scope)

    def count(self, error: SplitError) -> None:
        """Counts a message that was dropped."""
        count_dropped(self.counters, error)
