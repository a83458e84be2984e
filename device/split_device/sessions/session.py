"""One session on one worker: requests out, replies in, whatever is lost on the way."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from split_common.errors import (
    AuthenticationError,
    BrokerUnreachable,
    Busy,
    Malformed,
    NeedEmbeddings,
    NonFinite,
    PromptTooLong,
    SessionLost,
    SplitError,
    StepFailed,
    WorkerGone,
    WorkerSlow,
)
from split_common.protocol import headers, payloads
from split_common.protocol.channel import CHANNEL_SESSIONS, Channel, SessionKeys
from split_common.transport import Transport
from split_common.trust.keys import Roster
from split_device.sessions.timings import StepTimings

#: Seconds without a reply after which a request is sent again; doubles each time, up to the second.
RETRANSMIT = 3.0
MAX_RETRANSMIT = 10.0

#: Requests of one session that may be unanswered; further ones are sent as replies arrive.
IN_FLIGHT = 32

#: Least seconds before a retry, whatever a peer asks for.
MIN_RETRY = 0.1

#: Seconds between two checks, while no message comes, of whether to go on waiting.
CHECK_INTERVAL = 0.25

#: What the transport's thread hands over: a message, or what became of the session.
Event = tuple[headers.AnyHeader, bytes] | SplitError

#: A worker's answer to one request, and its tensor's bytes.
Reply = tuple[payloads.AnyReply, memoryview]

#: Error message: the worker died, left, or does not know the session.
GONE = "the worker that held the session is gone"

#: Error message: the caller abandoned the session.
ABANDONED = "the session was given up"


@dataclass
class WorkerChannel:
    """A channel to one worker. Session 0 is the channel itself."""

    worker: bytes
    number: int
    crypto: Channel
    control: SessionKeys
    #: Sessions that may still be opened over it.
    sessions_left: int = field(default_factory=lambda: CHANNEL_SESSIONS)

    @property
    def worker_name(self) -> str:
        """The worker's name in the fleet, from its certificate."""
        return self.crypto.peer.name

    @property
    def usable(self) -> bool:
        """Whether another session may be opened over it."""
        return self.sessions_left > 0 and not self.crypto.expired

    def trusted(self, roster: Roster) -> bool:
        """Whether the worker's certificate is still valid by this roster."""
        return self.crypto.trusted(roster)


class SessionHost(Protocol):
    """What a session needs of the connection that it runs over. `Client` is one."""

    #: This device's id in the queue.
    id: bytes
    transport: Transport
    #: Seconds of the broker's silence after which a call fails.
    timeout: float
    #: Seconds without a reply after which a worker is too slow, if another one is available.
    step_timeout: float

    def new_session(self, channel: WorkerChannel, number: int, epoch: int) -> RemoteSession | None:
        """A session over a channel; None if the channel takes no more of them."""

    def forget(self, session: RemoteSession) -> None:
        """No more messages are delivered to the session."""

    def has_other(self, worker: bytes) -> bool:
        """Whether a worker other than this one is available. May set up a channel to it."""

    def count(self, error: SplitError) -> None:
        """Counts a message that was dropped."""


class RemoteSession:
    """One epoch of a session, on one worker. Requests are answered in order; lost ones are sent again as they were.

    Not thread-safe: one thread at a time calls it. `close`, `interrupt`, `lose` and `resend` may be called in any.
    """

    def __init__(self, host: SessionHost, channel: WorkerChannel, number: int, epoch: int) -> None:
        self.channel = channel
        self.worker = channel.worker
        self.number = number
        self.epoch = epoch
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._host = host
        self._keys = channel.crypto.session_keys(number, epoch)
        self._seq = 0
        #: Requests that were sent and not answered, by sequence number.
        self.in_flight: dict[int, tuple[headers.Relay, bytes]] = {}
        self._lost: SplitError | None = None
        # When requests that were bounced are sent again, whatever arrives before.
        self._again_at = math.inf
        #: Whether the worker may take as long as it likes.
        self.patient = False

    @property
    def acked(self) -> int:
        """All replies below this sequence number have arrived."""
        return min(list(self.in_flight), default=self._seq)

    def expects(self, header: headers.Relay | headers.Bounce) -> bool:
        """Whether a message may be about a request in flight."""
        from_worker = not isinstance(header, headers.Relay) or header.sender == self.worker
        return from_worker and header.epoch == self.epoch and header.seq in self.in_flight

    def call(
        self, requests: Sequence[tuple[payloads.Payload, memoryview | bytes]], timings: StepTimings | None = None
    ) -> list[Reply]:
        """Sends requests, several ahead, and waits for the reply of each.

        Args:
            requests: the messages and their tensors' bytes.
            timings: is told how long sealing and opening them took.

        Raises:
            SessionLost: the worker is gone or does not hold the session any more.
            Busy, NonFinite, Malformed, PromptTooLong, NeedEmbeddings: the worker refused a request.
            UnsupportedFeature: the worker lacks a capability that a request needs; nothing was sent.
            BrokerUnreachable: the broker has been silent for the client's timeout.
        """
        if self._lost is not None:
            raise self._lost
        for request, _ in requests:
            self.channel.crypto.require(request.needs)
        timings = timings or StepTimings()
        first = self._seq
        waiting = deque(requests)
        replies: dict[int, Reply] = {}
        try:
            while len(replies) < len(requests):
                while waiting and len(self.in_flight) < IN_FLIGHT:
                    request, data = waiting.popleft()
                    with timings.measure("encrypt"):
                        frames = self._seal(request, data)
                    self._send(frames)
                header, body = self._next_event()
                try:
                    with timings.measure("decrypt"):
                        reply, tensor = self._open(header, body)
                except AuthenticationError as error:
                    self._host.count(error)
                    continue
                replies[header.seq - first] = reply, tensor
                if isinstance(reply, payloads.Refusal) and isinstance(refused := refusal_error(reply), SessionLost):
                    raise refused
        except BaseException as error:
            self._end(error)
            raise
        answers = [replies[i] for i in range(len(requests))]
        for (asked, _), (reply, _) in zip(requests, answers, strict=True):
            if isinstance(reply, payloads.Refusal):
                raise refusal_error(reply)
            if not isinstance(reply, payloads.ANSWERS[type(asked)]):
                wrong = SessionLost(f"the worker answered a {type(asked).__name__} by a {type(reply).__name__}")
                self._end(wrong)
                raise wrong
        return answers

    def fork(self, number: int, epoch: int) -> RemoteSession:
        """A copy of the session on its worker, under its own number.

        Raises:
            SessionLost: the worker or the channel takes no copies; the session itself may go on.
            SplitError: as `call`.
        """
        if self._lost is not None:
            raise self._lost
        if "fork" not in self.channel.crypto.capabilities:
            raise SessionLost("the worker does not copy sessions")
        child = self._host.new_session(self.channel, number, epoch)
        if child is None:
            raise SessionLost("the channel to the worker takes no more sessions")
        try:
            child.call([(payloads.Fork(self.number, self.epoch), b"")])
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
            self._host.forget(self)
            self.events.put(error)

    def interrupt(self) -> None:
        """Makes the call under way, or the next one, end by `SessionLost`. Any thread may call it."""
        self.events.put(SessionLost(ABANDONED))

    def resend(self) -> None:
        """Sends again what has not been answered."""
        for frames in list(self.in_flight.values()):
            self._host.transport.send(*frames)

    def _end(self, error: BaseException) -> None:
        """Expects nothing more, and frees the session on its worker, which may hold it even after a refusal."""
        if self._lost is None:
            self._lost = error if isinstance(error, SessionLost) else SessionLost("the session was closed")
            self._send(self._seal(payloads.Close(), b""))
        self.in_flight.clear()
        self._host.forget(self)

    def _seal(self, payload: payloads.Payload, tensor: memoryview | bytes) -> tuple[headers.Relay, bytes]:
        """The next request, as it travels."""
        if isinstance(payload, payloads.Step | payloads.Denoise):
            payload = msgspec.structs.replace(payload, acked=self.acked)
        header = headers.Relay(
            self.worker,
            self._host.id,
            headers.RelayKind.REQUEST,
            self.channel.number,
            self.number,
            self.epoch,
            self._seq,
            self._keys.next_counter(),
        )
        plaintext = payloads.encode_payload(payload, tensor, overhead=self._keys.tag_size)
        return header, self._keys.seal(header, plaintext)

    def _send(self, frames: tuple[headers.Relay, bytes]) -> None:
        self.in_flight[self._seq] = frames
        self._seq += 1
        self._host.transport.send(*frames)

    def _next_event(self) -> tuple[headers.Relay, bytes]:
        """The next reply to a request in flight; sends the requests again when it takes long."""
        silent_since: float | None = None
        interval = RETRANSMIT
        resend_at = min(time.monotonic() + interval, self._again_at)
        too_slow_at = time.monotonic() + self._host.step_timeout
        while True:
            now = time.monotonic()
            if now >= too_slow_at and self.events.empty() and not self.patient:
                if self._host.has_other(self.worker):
                    raise WorkerSlow(f"the worker has not answered for {self._host.step_timeout:g} s")
                too_slow_at = time.monotonic() + self._host.step_timeout
            silent_since = None if self._host.transport.alive else silent_since or now
            if silent_since is not None and now - silent_since > self._host.timeout:
                raise BrokerUnreachable("the broker does not answer any more")
            if now >= resend_at:
                self.resend()
                self._again_at = math.inf
                interval = min(2 * interval, MAX_RETRANSMIT)
                resend_at = now + interval
            try:
                event = self._host.transport.receive(self.events, min(CHECK_INTERVAL, resend_at - now))
            except queue.Empty:
                continue
            if isinstance(event, SplitError):
                raise event
            header, body = event
            assert isinstance(header, headers.Bounce | headers.Relay)
            if header.seq not in self.in_flight:
                continue
            if isinstance(header, headers.Bounce):
                if header.reason in ("gone", "revoked"):
                    raise WorkerGone(GONE)
                # One of several, perhaps: all are sent again at once.
                self._again_at = resend_at = min(resend_at, now + max(MIN_RETRY, header.retry_after))
            else:
                return header, body

    def _open(self, header: headers.Relay, body: bytes) -> Reply:
        """A reply. Raises AuthenticationError, and the request then stays in flight."""
        reply, tensor = payloads.decode_payload(self._keys.open(header, body), payloads.reply_decoder)
        del self.in_flight[header.seq]
        return reply, tensor


def refusal_error(refusal: payloads.Refusal) -> SplitError:
    message = f"the worker refused: {printable(refusal.message)}"
    match refusal.reason:
        case "busy":
            return Busy(message, max(MIN_RETRY, refusal.retry_after))
        case "non-finite":
            return NonFinite(message)
        case "malformed":
            return Malformed(message)
        case "too-long":
            return PromptTooLong(message)
        case "embeddings":
            return NeedEmbeddings(message)
        case "failed":
            return StepFailed(message)
        case _:
            return SessionLost(message)


def printable(text: str) -> str:
    """What a peer said, fit for a terminal."""
    return "".join(character for character in text if character.isprintable())
