"""The worker: messages in on the transport's thread, steps computed on the worker's own, replies out.

The transport's thread authenticates, decrypts and orders requests; it never computes. The compute loop
(`split_worker.compute`) runs them, many in one forward, and seals the replies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from split_common.errors import (
    AuthenticationError,
    Busy,
    CertificateError,
    Malformed,
    OutOfOrder,
    WorkerFailed,
)
from split_common.protocol import headers, payloads
from split_common.protocol.channel import CHANNEL_LIFETIME, CHANNEL_SESSIONS, Channel, SessionKeys
from split_common.protocol.handshake import WorkerHandshake
from split_common.transport import Transport, new_peer_id
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, Identity, ModelScope, Role
from split_worker.bodies.base import AnyBody
from split_worker.compute import ComputeLoop
from split_worker.limits import WorkerLimits
from split_worker.requests import PendingRequest
from split_worker.sessions import Session, SessionTable

log = logging.getLogger(__name__)

#: Channels whose set-up has begun and not ended; beyond this the oldest is dropped.
MAX_HALF_OPEN = 256

#: Seconds that a device has to complete the set-up of a channel.
HALF_OPEN_TIMEOUT = 60.0

#: Channels of one device; beyond this the least recently used one is closed.
MAX_CHANNELS_PER_DEVICE = 8

#: Channels of all devices, each of which the worker watches; beyond this the least recently used one is closed.
MAX_CHANNELS = headers.MAX_WATCHED

ChannelId = tuple[bytes, int]


@dataclass
class HalfOpen:
    """A channel whose set-up has begun: what the device said, and the answer that it is given each time."""

    hello: bytes
    handshake: WorkerHandshake
    since: float = field(default_factory=time.monotonic)


@dataclass
class Link:
    """A channel in use: the keys of its control messages, and the highest epoch so far of each of its sessions."""

    channel: Channel
    control: SessionKeys
    epochs: dict[int, int] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)


class Worker:
    """Serves one body to a fleet's devices (a `split_common.transport.Handler`).

    Args:
        body: what to serve.
        service: the manifest root and the range of layers that the body is offered as.
        model: the model's name, for people.
        identity: this worker's certificate and keys.
        fleet: which devices it trusts.
        transport: the queue, not started yet.
        limits: how much to take on; None for the default.
        on_failure: called, on some thread, if the compute loop fails; `check` then tells why.
    """

    def __init__(
        self,
        body: AnyBody,
        service: headers.Service,
        model: str,
        identity: Identity,
        fleet: Fleet,
        transport: Transport,
        limits: WorkerLimits | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._body = body
        self._service = service
        self._model = model
        self._identity = identity
        self._fleet = fleet
        self._transport = transport
        self._sessions = SessionTable(limits)
        #: Names this worker on the queue, and in dead letters.
        self.id = new_peer_id(identity.certificate.name)
        self._half_open: OrderedDict[ChannelId, HalfOpen] = OrderedDict()
        # The least recently used one comes first.
        self._links: OrderedDict[ChannelId, Link] = OrderedDict()
        self._lock = threading.RLock()
        self._draining = False
        self._on_failure = on_failure
        self._compute = ComputeLoop(body, self._sessions, self._lock, self._answer, self._compute_failed)
        #: Steps, tokens, forwards, evictions and refusals, by name.
        self.counters: Counter[str] = self._compute.counters

    def facts(self) -> dict[str, float]:
        """The worker's state now, and its averages since its start.

        Returns:
            `sessions` held; `kv_tokens` and `kv_tokens_used` of its memory, or, for an image model, `held_bytes` of
            embeddings and steps in parts; `queued_bytes` of requests that wait; `steps`, `tokens`, `forwards` and
            `evictions` so far; `rows_per_forward`; `queue_ms`, how long a step waited; `tokens_per_second` while it
            computed.
        """
        with self._lock:
            counters = Counter(self.counters)
            sessions, queued = len(self._sessions), self._compute.queued_bytes
        return {
            "sessions": sessions,
            **self._body.memory(),
            "queued_bytes": queued,
            **{name: counters[name] for name in ("steps", "tokens", "forwards", "evictions")},
            "rows_per_forward": counters["rows"] / max(1, counters["forwards"]),
            "queue_ms": counters["queue_us"] / max(1, counters["steps"]) / 1000,
            "tokens_per_second": counters["tokens"] / max(1, counters["body_us"]) * 1e6,
        }

    def start(self, timeout: float = 10.0) -> None:
        """Joins the queue.

        Args:
            timeout: seconds to wait for the broker.

        Raises:
            BrokerUnreachable: it did not answer.
            CertificateError: the worker's certificate does not let it serve this model.
        """
        self._verify(self._identity.certificate_bytes, "worker")
        self._transport.start(self, timeout)
        self._compute.start()

    def drain(self, timeout: float) -> bool:
        """Takes no new sessions; whether all open ones end within `timeout` seconds."""
        self._draining = True
        self._transport.announce()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with self._lock:
                if not len(self._sessions):
                    return True
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        """Leaves the queue after the forward that is under way."""
        self._compute.stop()
        self._transport.close()

    def check(self) -> None:
        """Raises WorkerFailed if the compute loop has failed."""
        if self._compute.failure is not None:
            raise WorkerFailed(
                f"the compute loop failed by an unforeseen {type(self._compute.failure).__name__} "
                "(LAMBDA_SPLIT_LOG=debug shows the traceback)"
            )

    def _compute_failed(self) -> None:
        self._transport.announce()
        self._on_failure()

    # --- the transport's thread ----------------------------------------------------------------------------

    def announcement(self) -> headers.Announce:
        """The next heartbeat. It tells that the worker leaves if its compute loop has failed or hangs."""
        with self._lock:
            self._sessions.free_idle()
            self._forget_channels()
            watching = list({peer for peer, _ in self._links})[: headers.MAX_WATCHED]
            room = 0 if self._draining else self._sessions.room(self._free_tokens())
        return headers.Announce(
            self.id,
            "worker",
            self._identity.certificate.name,
            watching=watching,
            service=self._service,
            model=self._model,
            room=room,
            leaving=self._compute.failure is not None or self._compute.stuck(),
        )

    def on_message(self, header: headers.AnyHeader, body: bytes) -> None:
        with self._lock:
            match header:
                case headers.Open():
                    self._open_channel(header, body)
                case headers.Relay(kind=headers.RelayKind.FINISH):
                    self._finish_channel(header, body)
                case headers.Relay(kind=headers.RelayKind.REQUEST):
                    self._request(header, body)
                case headers.Bounce():
                    log.debug("a reply was not delivered: %s", header.reason)
                case _:
                    raise Malformed(f"a worker takes no {type(header).__name__}")

    def on_gone(self, peers: Iterable[bytes]) -> None:
        gone = set(peers)
        with self._lock:
            for id_ in [id_ for id_ in self._half_open if id_[0] in gone]:
                del self._half_open[id_]
            for id_ in [id_ for id_ in self._links if id_[0] in gone]:
                self._close_channel(id_)

    def on_reset(self) -> None:
        """Devices send again what the old broker lost."""

    def on_roster(self) -> None:
        with self._lock:
            self._forget_channels()

    def _open_channel(self, header: headers.Open, body: bytes) -> None:
        id_ = (header.sender, header.channel)
        half = self._half_open.get(id_)
        if half is None or half.hello != body:
            half = HalfOpen(body, WorkerHandshake(self._identity, self._verify, self._service, body))
            self._half_open[id_] = half
            if len(self._half_open) > MAX_HALF_OPEN:
                self._half_open.popitem(last=False)
        answer = headers.Relay(header.sender, self.id, headers.RelayKind.ANSWER, header.channel)
        self._transport.send(answer, half.handshake.answer)

    def _finish_channel(self, header: headers.Relay, body: bytes) -> None:
        id_ = (header.sender, header.channel)
        half = self._half_open.get(id_)
        if half is not None:
            try:
                channel = half.handshake.finish(body)
            except CertificateError:
                # It is the device's own, and authentic: no other end of this set-up will be better.
                self._unknown_channel(header, body)
                raise
            del self._half_open[id_]
            if id_ in self._links:
                self._close_channel(id_)
            self._make_room(header.sender)
            self._links[id_] = Link(channel, channel.session_keys(0, 0))
            self.counters["channels"] += 1
        if id_ not in self._links:
            self._unknown_channel(header, body)
            raise AuthenticationError("the end of a channel set-up that did not begin")
        confirmed = msgspec.structs.replace(header, session=0, epoch=0, seq=0)
        self._reply(self._links[id_].control, confirmed, payloads.Done())

    def _make_room(self, device: bytes) -> None:
        """Closes a channel if a new one of a device would be too many."""
        own = [id_ for id_ in self._links if id_[0] == device]
        if len(own) >= MAX_CHANNELS_PER_DEVICE:
            self._close_channel(own[0])
        elif len(self._links) >= MAX_CHANNELS:
            self._close_channel(next(iter(self._links)))

    def _unknown_channel(self, header: headers.Relay, body: bytes) -> None:
        """Tells a device to set up a new channel; without keys, this cannot be authenticated."""
        unknown = msgspec.structs.replace(header, to=header.sender, sender=self.id, kind=headers.RelayKind.UNKNOWN)
        self._transport.send(unknown, headers.echo(header, body))

    def _verify(self, certificate: bytes, role: Role) -> Certificate:
        scope = ModelScope(self._service.root, self._service.first, self._service.last)
        return self._fleet.verify(certificate, role, scope)

    def _request(self, header: headers.Relay, body: bytes) -> None:
        began = time.perf_counter()
        link = self._links.get((header.sender, header.channel))
        if link is None:
            self._unknown_channel(header, body)
            raise AuthenticationError("a request over a channel that is not set up")
        id_ = (header.sender, header.channel, header.session, header.epoch)
        session = self._sessions.get(id_)
        keys = session.keys if session is not None else link.channel.session_keys(header.session, header.epoch)
        plaintext = keys.open(header, body)
        link.used = time.monotonic()
        self._links.move_to_end((header.sender, header.channel))
        request, tensor = payloads.decode_payload(plaintext, payloads.request_decoder)
        if missing := request.needs - link.channel.capabilities:
            self._refuse_unopened(link, header, "malformed", f"the channel has no {', '.join(sorted(missing))}")
            return
        if isinstance(request, payloads.Close):
            # It may have overtaken the session's first request, which must then not open the session.
            link.epochs[header.session] = max(header.epoch, link.epochs.get(header.session, 0))
            self._sessions.close(id_)
            self._compute.wake()
            return
        if session is None:
            try:
                session = self._open_session(link, header, request)
            except Busy as error:
                self._refuse_unopened(link, header, "busy", str(error), error.retry_after)
                return
            if session is None:
                self._refuse_unopened(link, header, "lost", "the worker does not hold this session")
                return
        limits = self._sessions.limits
        if self._compute.queued_bytes + len(tensor) > limits.max_queued_bytes and header.seq >= session.expected:
            self._refuse_unopened(link, header, "full", "the worker's queue is full", limits.full_retry)
            return
        if not session.admit(header.seq):
            if frames := session.replies.get(header.seq):
                self._transport.send(*frames)
            elif header.seq < session.done:
                self._refuse_unopened(link, header, "lost", "the worker does not hold this reply any more")
            return
        self._compute.put(PendingRequest(session, header, request, tensor, began, time.perf_counter() - began))

    def _open_session(self, link: Link, header: headers.Relay, request: payloads.AnyRequest) -> Session[Any] | None:
        if header.session == 0 or header.epoch <= link.epochs.get(header.session, -1):
            return None
        if header.seq != 0:
            raise OutOfOrder(f"request {header.seq} of a session whose first has not arrived")
        if header.epoch:
            self._end_epochs(link, header)
        if self._draining or len(link.epochs) >= 2 * CHANNEL_SESSIONS:
            raise Busy("the worker takes no new sessions", retry_after=1.0)
        tokens = request.tokens if isinstance(request, payloads.Step) else 0
        id_ = (header.sender, header.channel, header.session, header.epoch)
        try:
            session = self._sessions.open(id_, link.channel, self._body.new_state(), self._free_tokens(tokens))
        except Busy:
            self._compute.wake()
            raise
        # The epoch is not accepted again: a second session under its keys would repeat nonces.
        link.epochs[header.session] = header.epoch
        return session

    def _free_tokens(self, reserved: int = 0) -> int | None:
        """Tokens that there is KV memory for, beside reserved ones; None if sessions take none."""
        store = self._body.store
        return store.free_tokens - reserved if store is not None else None

    def _end_epochs(self, link: Link, header: headers.Relay) -> None:
        """Closes a device's session of earlier epochs, whose requests are refused from now on."""
        for id_, other in self._links.items():
            known = other.epochs.get(header.session, -1)
            if id_[0] == header.sender and other.channel.peer == link.channel.peer and known < header.epoch:
                self._sessions.close((*id_, header.session, known))
                other.epochs[header.session] = header.epoch - 1
        self._compute.wake()

    def _refuse_unopened(
        self, link: Link, header: headers.Relay, reason: str, message: str, retry_after: float = 0.0
    ) -> None:
        """Refuses a request outside its session, under the channel's control keys."""
        self.counters[f"refused_{reason}"] += 1
        refusal = payloads.Refusal(reason, message, retry_after, header.session, header.epoch, header.seq)  # type: ignore[arg-type]
        self._reply(link.control, msgspec.structs.replace(header, session=0, epoch=0, seq=0), refusal)

    def _close_channel(self, id_: ChannelId) -> None:
        del self._links[id_]
        self._sessions.close_where(lambda session: session[:2] == id_)
        self._compute.wake()

    def _forget_channels(self) -> None:
        """Closes unused channels, and those of devices that are revoked or whose certificate has expired."""
        now = time.monotonic()
        roster = self._fleet.roster()
        for id_, half in list(self._half_open.items()):
            if now - half.since > HALF_OPEN_TIMEOUT:
                del self._half_open[id_]
        for id_, link in list(self._links.items()):
            trusted = link.channel.trusted(roster)
            if not trusted:
                log.warning("device %s is revoked, or its certificate has run out", link.channel.peer.name)
            if not trusted or now - link.used > 2 * CHANNEL_LIFETIME:
                self._close_channel(id_)

    # --- replies -------------------------------------------------------------------------------------------

    def _answer(self, request: PendingRequest, reply: payloads.Payload, tensor: memoryview | bytes) -> None:
        """Sends the reply to a request, and keeps it. Called on the compute loop's thread."""
        frames = self._reply(request.session.keys, request.header, reply, tensor)
        with self._lock:
            self._sessions.answered(request.session, frames)

    def _reply(
        self, keys: SessionKeys, request: headers.Relay, reply: payloads.Payload, tensor: memoryview | bytes = b""
    ) -> tuple[headers.Relay, bytes]:
        header = msgspec.structs.replace(
            request, to=request.sender, sender=self.id, kind=headers.RelayKind.REPLY, counter=keys.next_counter()
        )
        body = keys.seal(header, payloads.encode_payload(reply, tensor, overhead=keys.tag_size))
        self._transport.send(header, body)
        return header, body
