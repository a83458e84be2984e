"""The worker: takes messages, checks and orders requests, and sends replies.

The transport's thread authenticates, decrypts and orders requests; it never computes. The compute loop
(`split_worker.compute`) runs them on its own thread, many in one forward, and seals the replies. One lock guards
sessions and channels.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from split_common.errors import AuthenticationError, Busy, CertificateError, Malformed, OutOfOrder, WorkerFailed
from split_common.protocol import encoding, headers, payloads
from split_common.protocol.capabilities import KEEP
from split_common.protocol.channel import EpochKeys
from split_common.protocol.handshake import WorkerHandshake
from split_common.transport import Transport, new_peer_id, peer_name
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, Identity, ModelScope, Role, check_certificate
from split_common.trust.shares import TokenBuckets
from split_worker.bodies.base import AnyBody
from split_worker.channels import MAX_EPOCHS, ChannelTable, OpenChannel
from split_worker.compute import ComputeLoop
from split_worker.limits import WorkerLimits
from split_worker.repeats import Repeats
from split_worker.requests import PendingRequest
from split_worker.sessions import Session, SessionId, SessionTable, sequences_of
from split_worker.set_ups import ChannelId, SetUps

log = logging.getLogger(__name__)

#: A body of more bytes than this is not decrypted if its member has more than its share in the queue, because it
#: may come again and again. Smaller ones, such as a `Close`, are always read.
UNREAD_IF_FULL = 64 * 1024


class Worker:
    """Serves one body to a fleet's devices (a `split_common.transport.Handler`).

    Args:
        body: the body to serve.
        service: the manifest root and the range of layers that the body is offered as.
        model: the model's name, which is only shown.
        identity: this worker's certificate and keys.
        fleet: tells which devices are trusted.
        transport: the queue, not started yet.
        limits: of sessions and of the queue; None for the default.
        on_failure: called if the worker cannot serve any more, on any thread; `check` then raises the reason.
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
        self._sessions = SessionTable(limits, body.store)
        self._lacks = body.lacks if self._sessions.limits.kept_tokens != 0 else body.lacks | {KEEP}
        self._repeats = Repeats(self._sessions.limits)
        # Requests for sessions that are not open: each makes the worker derive keys, perhaps for nothing.
        self._strays = TokenBuckets(self._sessions.limits.stray_rate, self._sessions.limits.stray_burst)
        #: This worker's peer id on the queue and in dead letters.
        self.id = new_peer_id(identity.certificate.name)
        #: Its name in logs, notices and dead letters.
        self.name = peer_name(identity.certificate.name, self.id)
        self._channels = ChannelTable(SetUps(self._new_handshake, fleet.roster), self._channel_closed)
        self._lock = threading.RLock()
        self._draining = False
        self._on_failure = on_failure
        self._expired: CertificateError | None = None
        self._compute = ComputeLoop(body, self._sessions, self._lock, self._answer, self._compute_failed)
        #: Steps, tokens, forwards, evictions and refusals, by name.
        self.counters: Counter[str] = self._compute.counters

    def facts(self) -> dict[str, float]:
        """The worker's state now, and its averages since its start.

        Returns:
            `sessions`: open sessions; `kept`: those that are kept for copies. `kv_tokens` and `kv_tokens_used`:
            tokens that fit into the KV memory, and those in it; for an image model `held_bytes`, of embeddings and
            steps in parts. `queued_bytes`: bytes of requests that wait. `steps`, `tokens`, `forwards` and
            `evictions`: totals. `rows_per_forward`: an average. `queue_ms`: how long a step waited on average.
            `tokens_per_second`: while it computed.
        """
        with self._lock:
            counters = Counter(self.counters)
            sessions, kept = len(self._sessions), self._sessions.kept_sessions
            queued = self._compute.queued_bytes
        return {
            "sessions": sessions,
            "kept": kept,
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
        """Refuses new sessions from now on. Returns whether all open ones end within `timeout` seconds."""
        self._draining = True
        self._transport.announce()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with self._lock:
                self._sessions.close_kept()
                if not len(self._sessions):
                    return True
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        """Leaves the queue after the current forward."""
        self._compute.stop()
        self._transport.close()

    def check(self) -> None:
        """Says why the worker cannot serve any more.

        Raises:
            WorkerFailed: the compute loop has failed.
            CertificateError: the worker's certificate has run out.
        """
        if self._expired is not None:
            raise self._expired
        if self._compute.failure is not None:
            raise WorkerFailed(
                f"the compute loop failed with an unforeseen {type(self._compute.failure).__name__} "
                "(LAMBDA_SPLIT_LOG=debug shows the traceback)"
            )

    def _compute_failed(self) -> None:
        self._transport.announce()
        self._on_failure()

    # --- the transport's thread ----------------------------------------------------------------------------

    def announcement(self) -> headers.Announce:
        """The next heartbeat.

        It says that the worker leaves if its compute loop has failed or hangs, or if its certificate has run out.
        """
        try:
            check_certificate(self._identity.certificate, roster=None, role="worker")
        except CertificateError as error:
            self._expired = error
            self._on_failure()
        with self._lock:
            self._sessions.free_idle()
            self._channels.close_stale(self._fleet.roster())
            watching = list({peer for peer, _ in self._channels.open})[: headers.MAX_WATCHED]
            room = 0 if self._draining else self._sessions.room(self._free_tokens())
        return headers.Announce(
            self.id,
            "worker",
            self._identity.certificate.name,
            watching=watching,
            service=self._service,
            model=self._model,
            room=room,
            leaving=self._expired is not None or self._compute.failure is not None or self._compute.stuck(),
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
        with self._lock:
            self._channels.close_gone(peers)

    def on_reset(self) -> None:
        """Does nothing: devices send again what the old broker lost."""

    def on_roster(self) -> None:
        with self._lock:
            self._channels.close_stale(self._fleet.roster())

    def _open_channel(self, header: headers.Open, body: bytes) -> None:
        answer = self._channels.set_ups.begin((header.sender, header.channel), body)
        relay = headers.Relay(header.sender, self.id, headers.RelayKind.ANSWER, header.channel)
        self._transport.send(relay, answer)

    def _finish_channel(self, header: headers.Relay, body: bytes) -> None:
        id_ = (header.sender, header.channel)
        if id_ in self._channels.set_ups.half_open:
            try:
                self._channels.finish(id_, body)
            except CertificateError:
                self._unknown_channel(header, body)
                raise
            self.counters["channels"] += 1
        channel = self._channels.open.get(id_)
        if channel is None:
            self._unknown_channel(header, body)
            raise AuthenticationError("the end of a channel set-up that did not begin")
        confirmed = msgspec.structs.replace(header, session=0, epoch=0, seq=0)
        self._reply(channel.control, confirmed, payloads.Done())

    def _unknown_channel(self, header: headers.Relay, body: bytes) -> None:
        """Tells a device to set up a new channel. Without keys, this cannot be authenticated."""
        unknown = msgspec.structs.replace(header, to=header.sender, sender=self.id, kind=headers.RelayKind.UNKNOWN)
        self._transport.send(unknown, headers.echo(header, body))

    def _new_handshake(self, hello: bytes) -> WorkerHandshake:
        return WorkerHandshake(self._identity, self._verify, self._service, hello, lacks=self._lacks)

    def _verify(self, certificate: bytes, role: Role) -> Certificate:
        scope = ModelScope(self._service.root, self._service.first, self._service.last)
        return self._fleet.verify(certificate, role, scope)

    def _request(self, header: headers.Relay, body: bytes) -> None:
        began = time.perf_counter()
        channel_id = (header.sender, header.channel)
        channel = self._channels.open.get(channel_id)
        if channel is None:
            self._unknown_channel(header, body)
            raise AuthenticationError("a request over a channel that is not set up")
        id_ = (*channel_id, header.session, header.epoch)
        session = self._sessions.get(id_)
        if session is None and not self._strays.take(channel.member):
            # An honest device repeats it, if it waits for an answer.
            self.counters["too_often"] += 1
            return
        is_new = session is None or header.seq >= session.expected
        if is_new and len(body) > UNREAD_IF_FULL and self._compute.is_full(channel.member, len(body)):
            self._refuse_full(channel, header)
            return
        keys = session.keys if session is not None else channel.channel.epoch_keys(header.session, header.epoch)
        plaintext = keys.open(header, body)
        self._channels.touch(channel_id)
        request, tensor = encoding.decode_payload(plaintext, encoding.request_decoder)
        if missing := request.needs - channel.channel.capabilities:
            self._refuse_unopened(channel, header, "malformed", f"the channel has no {', '.join(sorted(missing))}")
            return
        if isinstance(request, payloads.Close):
            # If it has overtaken the session's first request, that one must not open the session any more. Where
            # no more sessions are remembered, none is opened either.
            self._channels.remember(
                channel_id, header.session, max(header.epoch, channel.epochs.get(header.session, 0))
            )
            self._sessions.close(id_)
            self._compute.wake()
            return
        if isinstance(request, payloads.Keep):
            self._sessions.keep(id_)
            self._compute.wake()
            return
        if session is None:
            try:
                session = self._open_session(id_, channel, header, request)
            except Busy as error:
                self._sessions.refused.append(id_)
                self._refuse_unopened(channel, header, "busy", str(error), error.retry_after)
                return
            if session is None:
                self._refuse_unopened(channel, header, "lost", "the worker does not hold this session")
                return
        held = encoding.held_bytes(plaintext)
        if header.seq >= session.expected and self._compute.is_full(session.member, held):
            self._refuse_full(channel, header)
            return
        if not session.admit(header.seq):
            self._repeat(channel, session, header)
            return
        self._compute.put(
            PendingRequest(session, header, request, tensor, held, began, time.perf_counter() - began)
        )

    def _refuse_full(self, channel: OpenChannel, header: headers.Relay) -> None:
        retry = self._sessions.limits.full_retry
        self._refuse_unopened(channel, header, "full", "the worker's queue is full", retry)

    def _repeat(self, channel: OpenChannel, session: Session[Any], header: headers.Relay) -> None:
        """Answers a request that has come before, if it has been computed and was not answered just now."""
        if frames := session.replies.get(header.seq):
            if self._repeats.allow(session, frames):
                self._transport.send(*frames)
            else:
                self.counters["withheld"] += 1
        elif header.seq < session.done:
            self._refuse_unopened(channel, header, "lost", "the worker does not hold this reply any more")

    def _open_session(
        self, id_: SessionId, channel: OpenChannel, header: headers.Relay, request: payloads.AnyRequest
    ) -> Session[Any] | None:
        latest = channel.epochs.get(header.session, -1)
        if header.session == 0 or header.epoch <= latest or (header.seq and id_ in self._sessions.refused):
            return None
        if header.seq != 0:
            raise OutOfOrder(f"request {header.seq} of a session whose first has not arrived")
        if header.epoch:
            self._end_epochs(channel, header)
        if isinstance(request, payloads.Fork):
            self._sessions.touch((header.sender, header.channel, request.parent, request.parent_epoch))
        if self._draining or len(channel.epochs) >= MAX_EPOCHS:
            raise Busy("the worker takes no new sessions", retry_after=1.0)
        tokens = request.tokens if isinstance(request, payloads.Step) else 0
        try:
            session = self._sessions.open(
                id_, channel.channel, self._body.new_state(channel.member), self._free_tokens(), tokens
            )
        except Busy:
            self._compute.wake()
            raise
        # This epoch is never accepted again, because a second session under its keys would repeat nonces.
        self._channels.remember(id_[:2], header.session, header.epoch)
        return session

    def _free_tokens(self) -> int | None:
        """Tokens that fit into the KV memory once closed sessions are freed; None if sessions take none."""
        store = self._body.store
        if store is None:
            return None
        return store.free_tokens + store.freed_by(sequences_of(list(self._sessions.closed)))

    def _end_epochs(self, channel: OpenChannel, header: headers.Relay) -> None:
        """Closes earlier epochs of a device's session, whose requests are refused from now on."""
        for id_, other in self._channels.open.items():
            known = other.epochs.get(header.session, -1)
            if id_[0] == header.sender and other.channel.peer == channel.channel.peer and known < header.epoch:
                self._sessions.close((*id_, header.session, known))
                self._channels.remember(id_, header.session, header.epoch - 1)
        self._compute.wake()

    def _refuse_unopened(
        self, channel: OpenChannel, header: headers.Relay, reason: str, message: str, retry_after: float = 0.0
    ) -> None:
        """Refuses a request outside its session, under the channel's control keys."""
        self.counters[f"refused_{reason}"] += 1
        log.debug("session %s of device %s: %s", headers.session_label(header.session), channel.member, message)
        refusal = payloads.Refusal(reason, message, retry_after, header.session, header.epoch, header.seq)  # type: ignore[arg-type]
        self._reply(channel.control, msgspec.structs.replace(header, session=0, epoch=0, seq=0), refusal)

    def _channel_closed(self, id_: ChannelId) -> None:
        self._sessions.close_where(lambda session: session[:2] == id_)
        self._compute.wake()

    # --- replies -------------------------------------------------------------------------------------------

    def _answer(self, request: PendingRequest, reply: payloads.Payload, tensor: memoryview | bytes) -> None:
        """Sends the reply to a request, and keeps it for repeats. Called on the compute loop's thread."""
        frames = self._reply(request.session.keys, request.header, reply, tensor)
        with self._lock:
            self._sessions.answered(request.session, frames)

    def _reply(
        self, keys: EpochKeys, request: headers.Relay, reply: payloads.Payload, tensor: memoryview | bytes = b""
    ) -> tuple[headers.Relay, bytes]:
        header = msgspec.structs.replace(
            request, to=request.sender, sender=self.id, kind=headers.RelayKind.REPLY, counter=keys.next_counter()
        )
        body = keys.seal(header, encoding.encode_payload(reply, tensor, overhead=keys.tag_size))
        self._transport.send(header, body)
        return header, body
