"""One epoch of a session, on one worker: sends requests until each is answered."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from split_common.errors import AuthenticationError, BrokerUnreachable, SessionLost, SplitError, WorkerSlow
from split_common.protocol import encoding, headers, payloads
from split_common.protocol.capabilities import INDIVISIBLE, KEEP, OUTPUTS, SESSION_KEYS, UNPADDED
from split_common.system.forks import Birthplace
from split_common.transport import Transport
from split_device.sessions.identity import SessionIdentity
from split_device.sessions.notices import Notices, OnNotice
from split_device.sessions.refusals import MIN_RETRY, refusal_error
from split_device.sessions.requests import AllRequests, Reply, Request, Requests
from split_device.sessions.timings import StepTimings
from split_device.sessions.worker_channel import WorkerChannel

#: Seconds without a reply after which a request is sent again; doubles each time, up to MAX_RETRANSMIT.
RETRANSMIT = 3.0
MAX_RETRANSMIT = 10.0

#: Requests of one session that may be unanswered; further ones are sent as replies arrive.
IN_FLIGHT = 32

#: Seconds between two checks of whether to give up, while no message comes.
CHECK_INTERVAL = 0.25

#: Seconds after which a call looks again for requests that have come meanwhile.
GLANCE = 0.005

#: Handed over by the transport's thread: a message, or the error that ended the session.
Event = tuple[headers.AnyHeader, bytes] | SplitError

#: Error message: the caller abandoned the session.
ABANDONED = "the session was given up"


class SessionHost(Protocol):
    """What a session needs of the connection that it runs over. `Client` is one."""

    #: This device's id in the queue.
    id: bytes
    transport: Transport
    #: Seconds of the broker's silence after which a call fails.
    timeout: float
    #: Seconds without a reply after which a worker is too slow, if another one is available.
    step_timeout: float
    #: Takes what is said of sessions.
    notices: Notices

    def new_session(self, channel: WorkerChannel, identity: SessionIdentity, epoch: int) -> RemoteSession | None:
        """A session over a channel; None if the channel was lost or takes no more sessions."""

    def forget(self, session: RemoteSession) -> None:
        """Stops delivering messages to the session."""

    def has_other(self, worker: bytes) -> bool:
        """Whether a worker other than this one is available. May set up a channel to it."""

    def count(self, error: SplitError) -> None:
        """Counts a message that was dropped."""


class RemoteSession:
    """One epoch of a session, on one worker. Requests are answered in order. Lost ones are sent again unchanged.

    Not thread-safe: one thread at a time calls it. Any thread may call `close`, `interrupt`, `lose` and `resend`.
    """

    def __init__(self, host: SessionHost, channel: WorkerChannel, identity: SessionIdentity, epoch: int) -> None:
        self.channel, self.worker = channel, channel.worker
        self.identity = identity
        #: How headers name it on this channel.
        self.ref = identity.on_wire(SESSION_KEYS in channel.crypto.capabilities)
        self.epoch = epoch
        #: None makes a call look for requests.
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._host = host
        self._keys = channel.crypto.epoch_keys(self.ref, epoch)
        self._seq = 0
        #: Requests without a reply, by sequence number.
        self.in_flight: dict[int, tuple[headers.Relay, bytes]] = {}
        self._lost: SplitError | None = None
        self._birthplace = Birthplace("the model")
        # When bounced requests are sent again, even if other messages arrive before; by `time.monotonic`.
        self._bounced_until = math.inf
        self.patient = False  #: Whether to wait for a slow worker.
        #: Takes what is said while a call waits.
        self.say: OnNotice = host.notices.say
        # Travels before the first request, in the same trip; None once the worker has taken it.
        self._opening: payloads.Fork | payloads.UseAdapter | None = None
        self.copied = False  #: Whether its worker has made it a copy.

    @property
    def takes_padding(self) -> bool:
        """Whether rows may have padding to their left, which does not travel."""
        return UNPADDED not in self.channel.crypto.capabilities

    @property
    def indivisible(self) -> bool:
        """Whether tokens that go through its worker together must do so in one message, and on the next worker."""
        return INDIVISIBLE in self.channel.crypto.capabilities

    @property
    def brief(self) -> bool:
        """Whether its worker returns only those outputs that are wanted."""
        return OUTPUTS in self.channel.crypto.capabilities

    @property
    def acked(self) -> int:
        """The lowest sequence number without a reply."""
        return min(list(self.in_flight), default=self._seq)

    def expects(self, header: headers.Relay | headers.Bounce) -> bool:
        """Whether a message may be about a request in flight."""
        from_worker = not isinstance(header, headers.Relay) or header.sender == self.worker
        return from_worker and header.epoch == self.epoch and header.seq in self.in_flight

    @property
    def is_copying(self) -> bool:
        """Whether it is to become a copy, and its worker has not answered yet."""
        return isinstance(self._opening, payloads.Fork)

    def call(self, requests: Sequence[Request], timings: StepTimings | None = None) -> list[Reply]:
        """Sends requests, several ahead, and waits for the reply of each.

        Args:
            requests: the messages and their tensors' bytes.
            timings: gets the time that encryption and decryption took.

        Raises:
            SessionLost: the worker is gone, or no longer holds the session.
            WorkerSlow: the worker has not answered for the step timeout, and another one is available.
            Busy, NonFinite, Malformed, PromptTooLong, NeedEmbeddings, UnknownAdapter, StepFailed: the worker
                refused a request.
            UnsupportedFeature: the worker lacks a capability that a request needs; nothing was sent.
            BrokerUnreachable: the broker has been silent for the client's timeout.
        """
        for request, _ in requests:
            self.channel.crypto.require(request.needs)
        return self.stream(AllRequests(requests), timings or StepTimings())

    def stream(self, requests: Requests, timings: StepTimings) -> list[Reply]:
        """Sends requests as they come, and waits for the reply of each. Errors are those of `call`."""
        if self._lost is not None:
            raise self._lost
        opening = self._opening
        if opening is not None:
            self.channel.crypto.require(opening.needs)
        replies = self._exchange(opening, requests, timings)
        if opening is not None:
            self._opening, self.copied = None, self.is_copying
        return replies

    def _exchange(self, opening: payloads.Payload | None, requests: Requests, timings: StepTimings) -> list[Reply]:
        first, refused = self._seq, False
        asked: list[type[payloads.Payload]] = []
        replies: dict[int, Reply] = {}
        passed = own = int(opening is not None)

        def send(payload: payloads.Payload, data: memoryview | bytes) -> None:
            self.channel.crypto.require(payload.needs)
            with timings.measure("encrypt"):
                frames = self._seal(payload, data)
            self._send(frames)
            asked.append(type(payload))

        try:
            if opening is not None:
                send(opening, b"")
            while True:
                while not (refused or requests.complete) and len(self.in_flight) < IN_FLIGHT:
                    if (request := requests.take(wait=not self.in_flight)) is None:
                        break
                    send(*request)
                if len(replies) == len(asked) and (refused or requests.complete):
                    break
                if (event := self._next_event(requests.growing and not requests.complete)) is None:
                    continue
                header, body = event
                try:
                    with timings.measure("decrypt"):
                        reply, tensor = self._open(header, body)
                except AuthenticationError as error:
                    self._host.count(error)
                    continue
                replies[header.seq - first] = reply, tensor
                if isinstance(reply, payloads.Refusal):
                    refused = True
                    if isinstance(lost := refusal_error(reply), SessionLost):
                        raise lost
                    continue
                if not isinstance(reply, payloads.ANSWERS[wanted := asked[header.seq - first]]):
                    raise SessionLost(f"the worker answered a {wanted.__name__} by a {type(reply).__name__}")
                self._answered()
                if not self.is_copying:
                    # Also if a step behind it is refused: that one is sent again without it.
                    self._opening = None
                while not refused and passed in replies:
                    requests.answered(passed - own, replies[passed])
                    passed += 1
        except BaseException as error:
            self._end(error)
            raise
        answers = [replies[i] for i in range(len(asked))]
        for reply, _ in answers:
            if isinstance(reply, payloads.Refusal):
                raise refusal_error(reply)
        return answers[own:]

    def _answered(self) -> None:
        """Tells the queue at once if this is the worker's first answer, so that other devices get it, too."""
        if not self.channel.answered:
            self.channel.answered = True
            self._host.transport.announce()

    def fork(self, identity: SessionIdentity, epoch: int) -> RemoteSession:
        """A copy of the session on its worker, under its own key.

        Raises:
            SessionLost: the worker or the channel cannot hold the copy, or the session is lost.
            SplitError: see `call`.
        """
        if self._lost is not None:
            raise self._lost
        if "fork" not in self.channel.crypto.capabilities:
            raise SessionLost("the worker does not copy sessions")
        child = self._host.new_session(self.channel, identity, epoch)
        if child is None:
            raise SessionLost("the channel to the worker takes no more sessions")
        try:
            child.call([(payloads.Fork(self.ref, self.epoch), b"")])
        except SplitError:
            child.close()
            raise
        return child

    @property
    def can_be_copied(self) -> bool:
        """Whether it has not ended, and its channel and its worker take copies."""
        return self._lost is None and self.channel.usable and "fork" in self.channel.crypto.capabilities

    def copy(self, identity: SessionIdentity, epoch: int) -> RemoteSession | None:
        """A session whose first call makes it a copy of what this one is then; None if that cannot be.

        That call takes no further trip. If the copy is refused, its error is that of the refusal. Any thread may
        call this.
        """
        if not self.can_be_copied:
            return None
        child = self._host.new_session(self.channel, identity, epoch)
        if child is not None:
            child._opening = payloads.Fork(self.ref, self.epoch)
        return child

    def begin_with(self, adapter: payloads.UseAdapter) -> None:
        """Makes the first call of a new session choose an adapter. That takes no further trip."""
        self._opening = adapter

    def keep(self) -> bool:
        """Tells the worker that this session takes no more steps, and is held for copies alone.

        Returns:
            Whether it may be held: not if it has ended, or the worker keeps no sessions.
        """
        if self._lost is not None or KEEP not in self.channel.crypto.capabilities:
            return False
        self._send(self._seal(payloads.Keep(), b""))
        # It is not answered, and lost in vain: the worker then holds an idle session.
        self.in_flight.clear()
        return True

    @property
    def ended(self) -> bool:
        """Whether the session can take no more requests."""
        return self._lost is not None

    def close(self) -> None:
        """Frees the session on its worker, without waiting. The garbage collector may call it, on any thread.

        In a forked child it only forgets the session, which is still its parent's.
        """
        if self._lost is None:
            self._end(SessionLost("the session was closed"))

    def lose(self, error: SplitError) -> None:
        """Ends the session with an error: the worker no longer holds it, or must not be written to."""
        if self._lost is None:
            self._lost = error
            self._host.forget(self)
            self.events.put(error)

    def interrupt(self) -> None:
        """Makes the call under way, or the next one, raise `SessionLost`. Any thread may call it."""
        self.events.put(SessionLost(ABANDONED))

    def resend(self) -> None:
        """Sends all requests without a reply again. Any thread may call it."""
        for frames in list(self.in_flight.values()):
            self._host.transport.send(*frames)

    def _end(self, error: BaseException) -> None:
        """Ends the session, and frees it on its worker, which may hold it even after a refusal."""
        if self._lost is None:
            self._lost = error if isinstance(error, SessionLost) else SessionLost("the session was closed")
            if not self._birthplace.is_elsewhere:
                self._send(self._seal(payloads.Close(), b""))
        self.in_flight.clear()
        self._host.forget(self)

    def _seal(self, payload: payloads.Payload, tensor: memoryview | bytes) -> tuple[headers.Relay, bytes]:
        """Seals the next request. Raises ForkedProcess in a forked child: its parent uses the same nonces."""
        self._birthplace.check()
        if isinstance(payload, payloads.Step | payloads.Denoise):
            payload = msgspec.structs.replace(payload, acked=self.acked)
        header = headers.Relay(
            self.worker,
            self._host.id,
            headers.RelayKind.REQUEST,
            self.channel.number,
            self.ref,
            self.epoch,
            self._seq,
            self._keys.next_counter(),
        )
        plaintext = encoding.encode_payload(payload, tensor, overhead=self._keys.tag_size)
        return header, self._keys.seal(header, plaintext)

    def _send(self, frames: tuple[headers.Relay, bytes]) -> None:
        self.in_flight[self._seq] = frames
        self._seq += 1
        self._host.transport.send(*frames)

    def _next_event(self, glance: bool = False) -> tuple[headers.Relay, bytes] | None:
        """The next reply to a request in flight; None to look for requests. Sends again if that takes long.

        Args:
            glance: whether to wait for `GLANCE` alone; then the answer is None if none came.

        Raises:
            WorkerSlow, WorkerGone, BrokerUnreachable: see `call`.
            SplitError: the error that ended the session.
        """
        silent_since: float | None = None
        interval = RETRANSMIT
        resend_at = min(time.monotonic() + interval, self._bounced_until)
        too_slow_at = time.monotonic() + self._host.step_timeout
        while True:
            now = time.monotonic()
            if now >= too_slow_at and self.events.empty() and not self.patient:
                if self._host.has_other(self.worker):
                    name, seconds = self.channel.worker_name, self._host.step_timeout
                    raise WorkerSlow(f"worker {name} has not answered for {seconds:g} s")
                too_slow_at = time.monotonic() + self._host.step_timeout
            if self._host.transport.alive:
                silent_since = None
            elif silent_since is None:
                silent_since = now
                self.say(f"the broker does not answer: waiting {self._host.timeout:g} s for it")
            if silent_since is not None and now - silent_since > self._host.timeout:
                raise BrokerUnreachable("the broker does not answer any more")
            if now >= resend_at:
                if not self._host.transport.sending or now >= self._bounced_until:
                    self.resend()
                self._bounced_until = math.inf
                interval = min(2 * interval, MAX_RETRANSMIT)
                resend_at = now + interval
            try:
                wait = GLANCE if glance else CHECK_INTERVAL
                event = self._host.transport.receive(self.events, min(wait, resend_at - now))
            except queue.Empty:
                if glance:
                    return None
                continue
            if event is None:
                return None
            if isinstance(event, SplitError):
                raise event
            header, body = event
            assert isinstance(header, headers.Bounce | headers.Relay)
            if header.seq not in self.in_flight:
                continue
            if isinstance(header, headers.Bounce):
                # If several requests are bounced, all are sent again together.
                self._bounced_until = resend_at = min(resend_at, now + max(MIN_RETRY, header.retry_after))
            else:
                return header, body

    def _open(self, header: headers.Relay, body: bytes) -> Reply:
        """Opens a reply. Raises AuthenticationError if it is not authentic; the request then stays in flight."""
        reply, tensor = encoding.decode_payload(self._keys.open(header, body), encoding.reply_decoder)
        del self.in_flight[header.seq]
        return reply, tensor
