"""A device's connection to the queue: takes its messages, and opens sessions on workers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from split_common.errors import (
    AuthenticationError,
    CertificateError,
    Malformed,
    NoWorker,
    SessionLost,
    SplitError,
    WorkerGone,
)
from split_common.models.codecs import CODECS, EXACT
from split_common.models.codecs.base import Codec
from split_common.protocol import encoding, headers, payloads
from split_common.system.forks import Birthplace
from split_common.transport import Transport, count_dropped, new_peer_id
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, Identity, ModelScope, Role, check_certificate
from split_device.sessions.channels import Channels, Check
from split_device.sessions.connection import PAD_STEPS, PATIENCE, STEP_TIMEOUT, TIMEOUT
from split_device.sessions.identity import SessionIdentity, SessionNames
from split_device.sessions.notices import Notices, OnNotice
from split_device.sessions.refusals import refusal_error
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import Timings
from split_device.sessions.warm_up import WarmUp
from split_device.sessions.worker_channel import WorkerChannel


class Client:
    """A device's connection: finds workers of one service and opens sessions (a transport's `Handler`).

    Any thread may use it.

    Args:
        transport: the queue, not started yet.
        fleet, identity: the members that the device trusts, and its own keys.
        service: the body that it needs.
        model: the model's name, for error messages.
        dtype: of the hidden states that it computes.
        timeout: seconds to wait for the broker, and for the answer to a message of a channel's set-up.
        patience: seconds that sessions wait while all workers are full.
        wait_for_first: whether they wait so long also if no worker of any model is there.
        codec: encodes the hidden states of language models.
        pad_steps: whether the sizes of decoding steps do not follow their tokens.
        step_timeout: seconds without a reply after which a worker is too slow, if another one is available.
        command: starts a worker that serves the body, for messages.
        unit: what a body's range counts, for messages: "layers", or "blocks" of a denoiser.
        on_notice: takes one line of text when a worker is lost, waited for or found; None to log it. Called on any
            thread.
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
        step_timeout: float = STEP_TIMEOUT,
        command: str = "lambda-split worker",
        unit: str = "layers",
        on_notice: OnNotice | None = None,
        wait_for_first: bool = False,
        codec: Codec = CODECS[EXACT],
        pad_steps: bool = PAD_STEPS,
    ) -> None:
        self.transport = transport
        self.codec = codec
        self.pad_steps = pad_steps
        self.timeout = timeout
        self.patience = patience
        self._wait_for_first = wait_for_first
        self.step_timeout = step_timeout
        self.command = command
        self.unit = unit
        self.notices = Notices(on_notice)
        self.timings = Timings()
        #: Messages dropped because they broke the protocol, by type of error.
        self.counters: Counter[str] = Counter()
        self._fleet = fleet
        self._identity = identity
        self.service = service
        self.model = model
        self.id = new_peer_id(identity.certificate.name)
        # Joins a session to its channel. The garbage collector closes sessions on any thread, perhaps on one that
        # holds this lock. Closing therefore takes no lock, and dictionaries are copied before they are searched.
        self._lock = threading.Lock()
        self._channels = Channels(self, identity, dtype)
        self._names = SessionNames()
        #: By the channel's number, and what headers call the session.
        self._sessions: dict[tuple[int, headers.SessionRef], RemoteSession] = {}
        #: Sets up channels before they are needed; None if that was not asked for.
        self._warm_up: WarmUp | None = None
        self._closed = False
        self._birthplace = Birthplace("the model")

    def __deepcopy__(self, memo: object) -> Client:
        return self

    def start(self) -> None:
        """Joins the queue.

        Raises:
            CertificateError: this device's certificate is not valid now.
            BrokerUnreachable: the broker does not answer within the timeout.
        """
        # The broker would not answer, and so not say why.
        check_certificate(self._identity.certificate, roster=None, role="device")
        self.transport.start(self, self.timeout)

    def close(self) -> None:
        """Leaves the queue; workers free this device's sessions.

        Only the first call has an effect, and none in a forked child, whose parent stays in the queue.
        """
        if self._closed or self._birthplace.is_elsewhere:
            return
        self._closed = True
        self._channels.close()
        if self._warm_up is not None:
            self._warm_up.close()
        self.transport.close()

    def check_process(self) -> None:
        """Raises ForkedProcess in a process that was forked since this client was made."""
        self._birthplace.check()

    @property
    def served(self) -> bool:
        """Whether a worker of the service was ever found: if so, one that is missing may come back."""
        return self._channels.served

    def waits_after(self, error: NoWorker) -> bool:
        """Whether to wait although none was ever found: not if there are workers, but of other models or layers."""
        return self._wait_for_first and error.served == "none"

    def say_unpadded(self, channel: WorkerChannel) -> None:
        """Says, once for a channel, that its worker does not pad its answers as steps need it."""
        if not channel.said_unpadded:
            channel.said_unpadded = True
            self.notices.say(
                f"worker {channel.worker_name!r} runs an older version, which does not pad its answers: the queue "
                "sees how many tokens are drafted; update it"
            )

    # --- the transport's thread ----------------------------------------------------------------------------

    def announcement(self) -> headers.Announce:
        self.on_roster()
        if self._warm_up is not None:
            self._warm_up.look()
        channels = self._channels.all()
        workers = list({channel.worker for channel in channels})
        answered = list({channel.worker for channel in channels if channel.answered})
        return headers.Announce(
            self.id,
            "device",
            self._identity.certificate.name,
            watching=workers[: headers.MAX_WATCHED],
            answered=answered[: headers.MAX_ANSWERED],
        )

    def on_message(self, header: headers.AnyHeader, body: bytes) -> None:
        match header:
            case headers.Relay(kind=headers.RelayKind.ANSWER) | headers.Bounce(session=0):
                self._channels.deliver(header, body)
            case headers.Relay(kind=headers.RelayKind.REPLY, session=0):
                if not self._channels.deliver(header, body):
                    self._refused_unopened(header, body)
            case headers.Relay(kind=headers.RelayKind.REPLY) | headers.Bounce():
                session = self._sessions.get((header.channel, header.session))
                if session is None or not session.expects(header):
                    # Repeated, or of an earlier epoch, e.g. from a worker that counted as dead.
                    self.counters["late"] += 1
                elif isinstance(header, headers.Bounce) and header.reason in ("gone", "revoked"):
                    # The queue has noticed it before this device was told: no session may use the channel any more.
                    self._lose(lambda channel: channel is session.channel)
                else:
                    session.events.put((header, body))
            case headers.Relay(kind=headers.RelayKind.UNKNOWN):
                if not self._channels.deliver(header, body):
                    self._channel_unknown(header, body)
            case _:
                raise Malformed(f"a device takes no {type(header).__name__}")

    def _refused_unopened(self, header: headers.Relay, body: bytes) -> None:
        """Takes the refusal of a request that its worker could not open; it comes over the channel's session 0."""
        channel = self._channels.get(header.channel)
        if channel is None:
            return
        refusal, _ = encoding.decode_payload(channel.control.open(header, body), encoding.reply_decoder)
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
        """Ends a channel that its worker does not know.

        Raises:
            AuthenticationError: the message is not the echo of a request in flight.
        """
        session = self._sessions.get((header.channel, header.session))
        request = session.in_flight.get(header.seq) if session is not None else None
        if session is None or request is None or body != headers.echo(*request):
            raise AuthenticationError("an unknown channel, of no request in flight")
        self._lose(lambda channel: channel is session.channel)

    def on_gone(self, peers: Iterable[bytes]) -> None:
        gone = set(peers)
        self._lose(lambda channel: channel.worker in gone)

    def _lose(self, which: Callable[[WorkerChannel], bool], error: SplitError | None = None) -> None:
        """Ends channels and the sessions over them.

        Args:
            which: selects the channels.
            error: raised by the sessions; None for `WorkerGone`.
        """
        for channel in filter(which, self._channels.all()):
            with self._lock:
                self._channels.remove(channel.number)
                lost = [session for session in list(self._sessions.values()) if session.channel is channel]
            held = sum(bool(session.in_flight) for session in lost)
            for session in lost:
                session.lose(error or WorkerGone(f"worker {channel.worker_name} is gone", max(1, held)))

    def on_reset(self) -> None:
        # A set-up repeats its messages by itself.
        for session in list(self._sessions.values()):
            session.resend()

    def on_roster(self) -> None:
        """Ends channels to workers that are not trusted any more, or all if that holds for this device itself."""
        roster = self._fleet.roster()
        me = self._identity.certificate
        own = roster.by_sign_key(me.sign_key)
        if own is None or own.revoked:
            self._lose(lambda _: True, CertificateError(f"device {me.name!r} is revoked"))
        try:
            check_certificate(me, roster=None, role="device")
        except CertificateError as expired:
            # The queue does not pass its messages on any more.
            self._lose(lambda _: True, SessionLost(str(expired)))
        error = SessionLost("the worker that held the session is revoked, or its certificate has run out")
        self._lose(lambda channel: not channel.trusted(roster), error)

    # --- sessions ------------------------------------------------------------------------------------------

    def name_session(self, request_id: str | None = None, index: int = 0) -> SessionIdentity:
        """Names a new session: see `SessionNames.name`."""
        return self._names.name(request_id, index)

    def open_session(
        self,
        avoid: Sequence[bytes] = (),
        identity: SessionIdentity | None = None,
        epoch: int = 0,
        check: Check = lambda: None,
        never: Sequence[bytes] = (),
    ) -> RemoteSession:
        """Opens an epoch of a session on some worker, which learns of it by the first request.

        Args:
            avoid: ids of workers that are used only if there is no other one.
            identity: the session's; None for a new one.
            epoch: higher than all earlier ones of this session; its worker forgets lower ones.
            check: called repeatedly meanwhile. An exception that it raises ends the search.
            never: ids of workers that are not used.

        Raises:
            NoWorker, Busy, BrokerUnreachable, AuthenticationError: as `Channels.choose`.
            ForkedProcess: this process was forked since this client was made.
        """
        self.check_process()
        identity = identity or self.name_session()
        while True:
            session = self.new_session(self._channels.choose(avoid, check, never), identity, epoch)
            if session is not None:
                return session

    def warm_up(self, request: payloads.Step, data: memoryview) -> None:
        """Has a channel set up in the background from now on whenever there is none (`WarmUp`).

        Args:
            request, data: a first step that any worker of the service can compute, and its tensor's bytes.
        """
        self.check_process()
        if self._warm_up is None:
            self._warm_up = WarmUp(self, request, data)
            self._warm_up.look()

    @property
    def has_channel(self) -> bool:
        """Whether a session could be opened without setting up a channel."""
        return any(channel.usable for channel in self._channels.all())

    def has_other(self, worker: bytes) -> bool:
        """Whether another worker is available. Sets up a channel to it, unless another thread is setting one up."""
        return self._channels.has_other(worker)

    def new_session(self, channel: WorkerChannel, identity: SessionIdentity, epoch: int) -> RemoteSession | None:
        """A session over this channel; None if the channel was lost or takes no more sessions."""
        with self._lock:
            if self._channels.get(channel.number) is None or not channel.sessions_left:
                return None
            channel.sessions_left -= 1
            session = RemoteSession(self, channel, identity, epoch)
            self._sessions[channel.number, session.ref] = session
            return session

    def forget(self, session: RemoteSession) -> None:
        key = session.channel.number, session.ref
        if self._sessions.get(key) is session:
            del self._sessions[key]

    def discard_unused_channels(self) -> None:
        """Removes the channels that take no more sessions and have none."""
        # Under the lock, no session joins a channel between the look and the removal.
        with self._lock:
            in_use = {session.channel.number for session in list(self._sessions.values())}
            for channel in self._channels.all():
                if not channel.usable and channel.number not in in_use:
                    self._channels.remove(channel.number)

    def verify(self, certificate: bytes, role: Role) -> Certificate:
        """Raises CertificateError for a certificate that does not hold for this role and body."""
        scope = ModelScope(self.service.root, self.service.first, self.service.last)
        return self._fleet.verify(certificate, role, scope)

    def count(self, error: SplitError) -> None:
        """Counts a message that was dropped."""
        count_dropped(self.counters, error)
