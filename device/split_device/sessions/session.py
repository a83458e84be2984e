"""One session on one worker: requests out, replies in, whatever is lost on the way."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from split_common import headers, payloads
from split_common.channel import CHANNEL_SESSIONS, Channel, SessionKeys
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

if TYPE_CHECKING:
    from split_device.sessions.client import Client

#: Seconds without a reply after which a request is sent again; doubles each time, up to the second.
RETRANSMIT = 3.0
MAX_RETRANSMIT = 10.0

#: Requests of one session that may be unanswered; further ones are sent as replies arrive.
IN_FLIGHT = 32

#: Least seconds before something is tried again, whatever a peer says.
MIN_RETRY = 0.1

#: Seconds between two looks, while nothing comes, at whether waiting still makes sense.
CHECK_INTERVAL = 0.25

#: What the transport's thread hands over: a message, or what became of the session.
Event = tuple[headers.AnyHeader, bytes] | SplitError

#: Of a session whose worker died, left, or knows nothing of it.
GONE = "the worker that held the session is gone"

#: Of a session that nobody wants any more.
GIVEN_UP = "the session was given up"


@dataclass
class WorkerChannel:
    """A channel to one worker. Session 0 is the channel itself."""

    worker: bytes
    number: int
    channel: Channel
    control: SessionKeys
    #: Sessions that it may still have.
    left: int = field(default_factory=lambda: CHANNEL_SESSIONS)


class RemoteSession:
    """One epoch of a session, on one worker. Requests are answered in order; lost ones are sent again as they were.

    Not thread-safe: a session belongs to one generation.
    """

    def __init__(self, client: Client, channel: WorkerChannel, number: int, epoch: int) -> None:
        self.channel = channel
        self.worker = channel.worker
        self.number = number
        self.epoch = epoch
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._client = client
        self._keys = channel.channel.session_keys(number, epoch)
        self._seq = 0
        #: Requests that were sent and not answered, by sequence number.
        self.in_flight: dict[int, tuple[headers.Relay, bytes]] = {}
        self._lost: SplitError | None = None
        # When requests that were sent back are sent again, whatever arrives meanwhile.
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
        self, requests: Sequence[tuple[payloads.Payload, memoryview | bytes]]
    ) -> list[tuple[payloads.AnyReply, memoryview]]:
        """Sends requests, several ahead, and waits for the reply of each.

        Raises:
            SessionLost: the worker is gone or does not hold the session any more.
            Busy, NonFinite, Malformed, PromptTooLong, NeedEmbeddings: the worker refused a request.
            BrokerUnreachable: the broker has been silent for the client's timeout.
        """
        if self._lost is not None:
            raise self._lost
        first = self._seq
        waiting = deque(requests)
        replies: dict[int, tuple[payloads.AnyReply, memoryview]] = {}
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
                if isinstance(reply, payloads.Refusal) and isinstance(refused := refusal_error(reply), SessionLost):
                    raise refused
        except BaseException as error:
            self._end(error)
            raise
        answers = [replies[i] for i in range(len(requests))]
        for (request, _), (reply, _) in zip(requests, answers, strict=True):
            if isinstance(reply, payloads.Refusal):
                raise refusal_error(reply)
            if not isinstance(reply, payloads.ANSWERS[type(request)]):
                wrong = SessionLost(f"the worker answered a {type(request).__name__} by a {type(reply).__name__}")
                self._end(wrong)
                raise wrong
        return answers

    def fork(self, number: int, epoch: int) -> RemoteSession:
        """A copy of the session on its worker, under a number of its own. Raises what `call` raises."""
        if self._lost is not None:
            raise self._lost
        child = self._client.new_session(self.channel, number, epoch)
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
            self._client.forget(self)
            self.events.put(error)

    def interrupt(self) -> None:
        """Makes the call under way, or the next one, end by `SessionLost`. Any thread may call it."""
        self.events.put(SessionLost(GIVEN_UP))

    def resend(self) -> None:
        """Sends again what has not been answered."""
        for frames in list(self.in_flight.values()):
            self._client.transport.send(*frames)

    def _end(self, error: BaseException) -> None:
        """Expects nothing more, and frees the session on its worker, which may hold it even after a refusal."""
        if self._lost is None:
            self._lost = error if isinstance(error, SessionLost) else SessionLost("the session was closed")
            self._send(payloads.Close(), b"")
        self.in_flight.clear()
        self._client.forget(self)

    def _send(self, payload: payloads.Payload, tensor: memoryview | bytes) -> None:
        began = time.perf_counter()
        if isinstance(payload, payloads.Step | payloads.Denoise):
            payload = msgspec.structs.replace(payload, acked=self.acked)
        header = headers.Relay(
            self.worker,
            self._client.id,
            headers.Kind.REQUEST,
            self.channel.number,
            self.number,
            self.epoch,
            self._seq,
            self._keys.next_counter(),
        )
        plaintext = payloads.encode_payload(payload, tensor, overhead=self._keys.tag_size)
        frames = header, self._keys.seal(header, plaintext)
        self._client.timings.add("encrypt", time.perf_counter() - began)
        self.in_flight[self._seq] = frames
        self._seq += 1
        self._client.transport.send(*frames)

    def _next_event(self) -> tuple[headers.Relay, bytes]:
        """The next reply to a request in flight; sends the requests again when it takes long."""
        silent_since: float | None = None
        interval = RETRANSMIT
        resend_at = min(time.monotonic() + interval, self._again_at)
        too_slow_at = time.monotonic() + self._client.step_timeout
        while True:
            now = time.monotonic()
            if now >= too_slow_at and self.events.empty() and not self.patient:
                if self._client.has_other(self.worker):
                    raise WorkerSlow(f"the worker has not answered for {self._client.step_timeout:g} s")
                too_slow_at = time.monotonic() + self._client.step_timeout
            silent_since = None if self._client.transport.alive else silent_since or now
            if silent_since is not None and now - silent_since > self._client.timeout:
                raise BrokerUnreachable("the broker does not answer any more")
            if now >= resend_at:
                self.resend()
                self._again_at = math.inf
                interval = min(2 * interval, MAX_RETRANSMIT)
                resend_at = now + interval
            try:
                event = self._client.transport.receive(self.events, min(CHECK_INTERVAL, resend_at - now))
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

    def _open_reply(self, header: headers.Relay, body: bytes) -> tuple[payloads.AnyReply, memoryview]:
        began = time.perf_counter()
        reply, tensor = payloads.decode_payload(self._keys.open(header, body), payloads.reply_decoder)
        self._client.timings.add("decrypt", time.perf_counter() - began)
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
