"""A device's channels to workers: which one a session may use, and how a new one is set up."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from split_common.errors import (
    AuthenticationError,
    BrokerUnreachable,
    Busy,
    CertificateError,
    NoWorker,
    ProtocolError,
    SplitError,
)
from split_common.protocol import encoding, headers, payloads
from split_common.protocol.handshake import DeviceHandshake
from split_common.transport import Transport, mark_of, member_mark
from split_common.transport.placement import Silences
from split_common.trust.keys import Certificate, Identity, Role
from split_device.sessions.refusals import MIN_RETRY, printable
from split_device.sessions.session import CHECK_INTERVAL, Event
from split_device.sessions.worker_channel import WorkerChannel

#: Seconds until a message of a channel's set-up is sent again; doubles each time. Workers answer it at once.
SET_UP_RETRANSMIT = 1.0

#: Seconds before a device looks for further workers again, after all of them were full.
SEARCH_PAUSE = 2.0

#: Most seconds for which a device avoids a worker that did not answer.
MAX_SILENCE = 30.0

#: Most workers that a device asks the broker to avoid.
MAX_AVOIDED = 64

#: Error message: the device was closed meanwhile.
CLOSED = "this device has left the queue"

#: Raises an error once the session that is being opened was abandoned.
Check = Callable[[], None]

_T = TypeVar("_T")


class ChannelHost(Protocol):
    """What channels need of the connection that they run over. `Client` is one."""

    #: This device's id in the queue.
    id: bytes
    transport: Transport
    #: Seconds to wait for the answer to a message of a set-up.
    timeout: float
    #: The body that the workers must serve, and the model's name for error messages.
    service: headers.Service
    model: str
    #: Starts a worker that serves the body, and what the body's range counts, for messages.
    command: str
    unit: str

    def verify(self, certificate: bytes, role: Role) -> Certificate:
        """Raises CertificateError for a certificate that does not hold for this role and body."""

    def discard_unused_channels(self) -> None:
        """Removes the channels that take no more sessions and have none."""

    def count(self, error: SplitError) -> None:
        """Counts a message that was dropped."""


class Channels:
    """A device's channels to workers of one service. Any thread may use it.

    Args:
        host: the connection.
        identity: the device's keys.
        dtype: of the hidden states that the device computes.
    """

    def __init__(self, host: ChannelHost, identity: Identity, dtype: payloads.Dtype) -> None:
        self._host = host
        self._identity = identity
        self._dtype: payloads.Dtype = dtype
        self._numbers = itertools.count(1)
        self._channels: dict[int, WorkerChannel] = {}
        # Held by the thread that sets up a channel: one at a time.
        self._setting_up = threading.Lock()
        #: Until then, workers to be avoided are used as well, by `time.monotonic`: all others are full.
        self._search_at = 0.0
        #: Messages for the channels that are being set up, by number.
        self._answers: dict[int, queue.SimpleQueue[Event]] = {}
        #: Workers, by id and name, that answered an open and then nothing more. Used by the thread that sets up.
        self._silences: Silences[tuple[bytes, str]] = Silences(most=MAX_SILENCE)
        self._closed = False
        #: Whether a worker of the service was ever found: if so, one that is missing may come back.
        self.served = False

    def get(self, number: int) -> WorkerChannel | None:
        return self._channels.get(number)

    def all(self) -> list[WorkerChannel]:
        return list(self._channels.values())

    def remove(self, number: int) -> None:
        self._channels.pop(number, None)

    def close(self) -> None:
        """Ends the set-up that is under way, and all later ones, by BrokerUnreachable."""
        self._closed = True
        for events in list(self._answers.values()):
            events.put(BrokerUnreachable(CLOSED))

    def deliver(self, header: headers.Relay | headers.Bounce, body: bytes) -> bool:
        """Hands a message to the set-up of its channel. Returns whether there is one."""
        events = self._answers.get(header.channel)
        if events is not None:
            events.put((header, body))
        return events is not None

    def choose(self, avoid: Sequence[bytes], check: Check, never: Sequence[bytes] = ()) -> WorkerChannel:
        """A channel that takes another session; it may have to be set up first.

        Args:
            avoid: ids of workers that are used only if there is no other one.
            never: ids of workers that are not used.
            check: called repeatedly during a set-up. An exception that it raises ends the set-up.

        Raises:
            NoWorker: no worker serves the body.
            Busy: all workers are full, or none answered in time; or there is none but those in `avoid` and `never`,
                and the message begins with `NOBODY_ELSE`.
            BrokerUnreachable: the broker does not answer, or the channels were closed.
            AuthenticationError: the device distrusts all workers that are available, or has no valid certificate
                itself.
        """
        channel = self._usable([*never, *avoid])
        if channel is None and time.monotonic() < self._search_at:
            channel = self._usable(never)
        return channel or self._set_up(avoid, never, check)

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

    def _usable(self, avoid: Sequence[bytes]) -> WorkerChannel | None:
        """The newest channel that takes another session, to a worker that is not to be avoided."""
        for channel in reversed(self.all()):
            if channel.usable and channel.worker not in avoid:
                return channel
        return None

    # --- set-up --------------------------------------------------------------------------------------------

    def _set_up(self, avoid: Sequence[bytes], never: Sequence[bytes], check: Check) -> WorkerChannel:
        distrusted: dict[bytes, CertificateError] = {}
        with self._setting_up:
            while True:
                # Another thread may have set one up meanwhile, or a full worker may have memory again.
                if (channel := self._usable([*never, *avoid])) is not None:
                    return channel
                known = len(distrusted)
                try:
                    return self._shake_hands([*never, *avoid, *distrusted], distrusted, check)
                except (Busy, NoWorker) as error:
                    if len(distrusted) > known:
                        continue
                    # Only workers with a wrong certificate remain.
                    if distrusted:
                        raise next(iter(distrusted.values())) from None
                    if isinstance(error, Busy) and (channel := self._usable(never)) is not None:
                        self._search_at = time.monotonic() + SEARCH_PAUSE
                        return channel
                    raise self._naming_silent(error) from None

    def _naming_silent(self, error: Busy | NoWorker) -> Busy | NoWorker:
        """The error that ends a set-up; if workers are avoided because they did not answer, it names them."""
        names = sorted({name for _, name in self._silences.now(time.monotonic()) if repr(name) not in str(error)})
        if isinstance(error, NoWorker) or not names:
            return error
        return Busy(f"{error}; no answer from worker {', '.join(map(repr, names))}", error.retry_after)

    def _shake_hands(
        self, avoid: Sequence[bytes], distrusted: dict[bytes, CertificateError], check: Check
    ) -> WorkerChannel:
        """Sets up a channel. Each message is repeated until it is answered, because it or the answer may be lost.

        Args:
            distrusted: gets the worker's id and the error, if its certificate is wrong.

        Raises:
            Busy: all workers are full, none answered in time, or the worker's certificate is wrong: try again.
            NoWorker, BrokerUnreachable, AuthenticationError: as `choose`.
        """
        host = self._host
        host.verify(self._identity.certificate_bytes, "device")
        number = next(self._numbers)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._answers[number] = events
        try:
            handshake = DeviceHandshake(self._identity, host.verify, host.service, self._dtype)

            def take_answer(header: headers.Relay, body: bytes) -> tuple[bytes, WorkerChannel] | None:
                if header.kind != headers.RelayKind.ANSWER or header.sender in distrusted:
                    return None
                try:
                    finish, crypto = handshake.finish(body)
                except CertificateError as error:
                    _check_sender(error.member, header.sender)
                    # Authentic, so it is final for this worker. Another worker may do.
                    distrusted[header.sender] = error
                    raise Busy(
                        "the worker's certificate is not valid for this body or fleet", retry_after=0.0
                    ) from None
                _check_sender(crypto.peer.name, header.sender)
                return finish, WorkerChannel(header.sender, number, crypto, crypto.epoch_keys(0, 0))

            def take_confirmation(header: headers.Relay, body: bytes) -> bool | None:
                if header.sender != channel.worker or header.kind == headers.RelayKind.ANSWER:
                    return None
                if header.kind == headers.RelayKind.UNKNOWN and body == headers.echo(last, finish):
                    raise Busy("the worker did not accept this device", retry_after=0.5)
                encoding.decode_payload(channel.control.open(header, body), encoding.reply_decoder)
                return True

            unresponsive = [worker for worker, _ in self._silences.now(time.monotonic())]
            first = headers.Open(host.id, number, host.service, [*avoid, *unresponsive][:MAX_AVOIDED])
            finish, channel = self._ask(events, first, handshake.hello, take_answer, check)
            last = headers.Relay(channel.worker, host.id, headers.RelayKind.FINISH, number)
            self._ask(events, last, finish, take_confirmation, check, channel)
            self._silences.end((channel.worker, channel.worker_name))
            self._channels[number] = channel
            self.served = True
        finally:
            del self._answers[number]
        host.discard_unused_channels()
        # Tells the broker at once that this device wants to hear of the worker's death.
        host.transport.announce()
        return channel

    def _ask(
        self,
        events: queue.SimpleQueue[Event],
        request: headers.Open | headers.Relay,
        body: bytes,
        take: Callable[[headers.Relay, bytes], _T | None],
        check: Check,
        channel: WorkerChannel | None = None,
    ) -> _T:
        """Sends a message of a set-up until `take` accepts an answer. Drops answers for which it returns None.

        Args:
            channel: to the worker that is asked; None while it is not known.
        """
        host = self._host
        deadline = time.monotonic() + host.timeout
        interval, send_at = SET_UP_RETRANSMIT, 0.0
        while True:
            check()
            now = time.monotonic()
            if self._closed:
                raise BrokerUnreachable(CLOSED)
            if now >= deadline:
                if not host.transport.alive:
                    raise BrokerUnreachable("the broker does not answer any more")
                raise self._unanswered(channel, now)
            if now >= send_at:
                host.transport.send(request, body)
                interval, send_at = 2 * interval, now + interval
            try:
                event = host.transport.receive(events, max(0.0, min(send_at - now, deadline - now, CHECK_INTERVAL)))
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
                    host.count(error)
                    continue
                if taken is not None:
                    return taken

    def _unanswered(self, channel: WorkerChannel | None, now: float) -> Busy:
        """The error of a set-up that got no answer. Its worker, if it is known, is avoided for a while."""
        if channel is None:
            return Busy("no worker answered in time", retry_after=0.5)
        self._silences.note((channel.worker, channel.worker_name), now)
        return Busy(f"worker {channel.worker_name!r} did not answer", retry_after=0.5)

    def _bounced(self, bounce: headers.Bounce) -> float:
        """Seconds until a bounced message of a set-up is sent again.

        Raises:
            NoWorker: no worker serves the body.
            Busy: all workers are full, or the worker went away.
        """
        match bounce.reason:
            case "full":
                return max(MIN_RETRY, bounce.retry_after)
            case "no-worker":
                service, served = self._host.service, printable(bounce.detail) or "none"
                body = f"{self._host.model} {self._host.unit} {service.first}:{service.last}"
                raise NoWorker(
                    f"no worker serves {body} with these weights (served here: {served}): start one with "
                    f"`{self._host.command}`",
                    served,
                )
            case "busy":
                raise Busy(printable(bounce.detail) or "every worker is full", max(MIN_RETRY, bounce.retry_after))
            case _:
                raise Busy("the worker went away", retry_after=MIN_RETRY)


def _check_sender(member: str | None, sender: bytes) -> None:
    """Raises AuthenticationError for an answer that comes under the peer id of another member than it proves.

    Args:
        member: None if the operator signed no certificate in it.
    """
    if member is None or member_mark(member) != mark_of(sender):
        raise AuthenticationError("an answer to a set-up comes under a peer id of another member")
