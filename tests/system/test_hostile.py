"""A hostile broker, device or worker: whatever it sends is refused and counted, and what is honest goes on."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from split_broker.peer_queue import Peer, RoutedMessage
from split_common.errors import (
    AuthenticationError,
    Busy,
    NonFinite,
    NoWorker,
    OutOfOrder,
    ProtocolError,
    SessionLost,
)
from split_common.protocol import encoding, headers, payloads
from split_common.protocol.channel import Channel, EpochKeys
from split_common.protocol.handshake import DeviceHandshake
from split_common.transport import new_peer_id
from split_common.transport.placement import Candidate, Refuse
from split_common.trust.keys import Certificate, ModelScope, Role, verify_certificate
from split_device import SplitModelForCausalLM
from split_device.sessions import channels
from split_device.sessions import session as session_module
from split_device.sessions.client import STEP_TIMEOUT, Client
from split_worker.limits import WorkerLimits
from split_worker.requests import PendingRequest
from split_worker.worker import Worker
from wiretap import LATE, SOON, FakeTransport, Setting, changed, cheat, run_steps, step, wait_until

STEPS = 60

pytestmark = pytest.mark.usefixtures("patient_queue")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[bytes]:
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        return run_steps(client, STEPS)


# --- a broker in the middle --------------------------------------------------------------------------------


class Mallory:
    """Adds damaged, truncated, old and misplaced copies to all that passes; may swap or swallow the rest."""

    def __init__(self, seed: int, swallow: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.swallow = swallow
        self.past: list[RoutedMessage] = []
        self.held: list[RoutedMessage] = []
        self.forged = 0

    def __call__(self, _peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
        if not isinstance(header, headers.Relay | headers.Open):
            return [message]
        self.past = [*self.past[-100:], message]
        forgeries = [self._forge(header, message) for _ in range(4)]
        self.forged += len(forgeries)
        honest = [] if self.random.random() < self.swallow else [message]
        # Swapped with an earlier one now and then.
        if self.swallow and self.random.random() < 0.2:
            honest, self.held = self.held, honest
        return [*forgeries[:2], *honest, *forgeries[2:]]

    def _forge(self, header: headers.Relay | headers.Open, message: RoutedMessage) -> RoutedMessage:
        head, body = message
        body = body or bytes(1)
        at = self.random.randrange(max(1, len(body)))
        match self.random.randrange(7):
            case 0:
                return head, body[:at]
            case 1:
                return head, bytes((*body[:at], body[at] ^ 1 << self.random.randrange(8), *body[at + 1 :]))
            case 2:
                return self.random.choice(self.past)
            case 3:
                spot = self.random.randrange(1, len(head))
                return bytes((*head[:spot], head[spot] ^ 1 << self.random.randrange(8), *head[spot + 1 :])), body
            case 4:
                return head, self.random.choice(self.past)[1]
            case 5:
                return head[: self.random.randrange(len(head))], body
        if isinstance(header, headers.Open):
            return changed(header, channel=header.channel + 1), body
        field = self.random.choice(["session", "epoch", "seq", "counter", "channel"])
        value = getattr(header, field)
        other = self.random.randbytes(16) if isinstance(value, bytes) else value + self.random.choice([1, 2])
        return changed(header, **{field: other}), body


def _opened(client: Client) -> Any:
    """A session. If an answer in a false envelope has spoiled a set-up, the device begins again, as callers do."""
    sessions: list[Any] = []

    def opens() -> bool:
        with contextlib.suppress(Busy):
            sessions.append(client.open_session())
        return bool(sessions)

    wait_until(opens)
    return sessions[0]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_forgeries_are_refused_and_counted_next_to_honest_messages(
    setting: Setting, expected: list[bytes], seed: int
) -> None:
    mallory = Mallory(seed)
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        cheat(broker, mallory)
        assert run_steps(client, STEPS, session=_opened(client)) == expected
        refused = client.transport.counters + client.counters + worker._transport.counters  # type: ignore[attr-defined]
        assert refused["HandlerError"] == broker.counters["failures"] == 0
        assert refused["AuthenticationError"] > 50
        assert refused["Malformed"] > 10
        assert worker.counters["steps"] == STEPS + 1
        wait_until(lambda: len(worker._sessions) == 0)
    assert mallory.forged > 400


@pytest.mark.parametrize("seed", range(2))
def test_lost_and_reordered_messages_cost_time_only(
    setting: Setting, expected: list[bytes], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "RETRANSMIT", 0.1)
    monkeypatch.setattr(channels, "SET_UP_RETRANSMIT", 0.1)
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        cheat(broker, Mallory(seed, swallow=0.1))
        session = client.open_session()
        answers = session.call([step(0, 7), *(step(7 + i) for i in range(STEPS))])
        assert [bytes(tensor) for _, tensor in answers] == expected
        assert worker.counters["steps"] == STEPS + 1


@pytest.mark.long
def test_a_model_generates_the_same_tokens_past_forgeries(setting: Setting) -> None:
    prompt = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    wanted = tiny.build("llama").generate(prompt, max_new_tokens=30, do_sample=False)
    with (
        setting.broker() as broker,
        setting.worker(broker.address),
        SplitModelForCausalLM.from_pretrained(
            setting.checkpoint, broker=broker.address, keys=setting.fleet.path
        ) as model,
    ):
        cheat(broker, Mallory(7))
        assert torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False), wanted)
        assert model.traffic["AuthenticationError"] > 10


def test_a_broker_that_pretends_to_restart_gets_no_storm(setting: Setting, expected: list[bytes]) -> None:
    """Each new name of the broker makes a device send again what is in flight, once."""
    number = 0

    def rename(_peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
        nonlocal number
        number += 1
        return [message, (headers.encode_header(headers.Welcome(number.to_bytes(8, "big"))), b"")]

    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        # Only the device hears of it, or announcement and welcome would answer each other for ever.
        cheat(broker, lambda peer, *rest: rename(peer, *rest) if isinstance(rest[0], headers.Relay) else [rest[1]])
        assert run_steps(client, STEPS) == expected
        assert worker.counters["steps"] == STEPS + 1
        assert client.transport.counters["messages_sent"] < STEPS + 30  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "lie",
    [
        lambda session: (headers.Welcome(bytes(8), gone=[session.worker]), b""),
        lambda session: (
            headers.Relay(
                session._host.id,
                session.worker,
                headers.RelayKind.UNKNOWN,
                session.channel.number,
                session.ref,
                0,
                1,
            ),
            headers.echo(*session.in_flight[1]),
        ),
        lambda session: (headers.Bounce("gone", session.channel.number, session.ref, 1), b""),
        lambda session: (headers.Bounce("revoked", session.channel.number, session.ref, 1), b""),
    ],
    ids=["gone", "unknown channel", "bounced", "revoked"],
)
def test_a_false_death_ends_a_session_by_a_typed_error_and_another_can_be_had(
    setting: Setting, expected: list[bytes], lie: Any
) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        told = False

        def answer_by_a_lie(_peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
            nonlocal told
            if told or not (isinstance(header, headers.Relay) and header.kind == headers.RelayKind.REPLY):
                return [message]
            told = True
            head, body = lie(session)
            return [(headers.encode_header(head), body)]

        cheat(broker, answer_by_a_lie)
        with pytest.raises(SessionLost):
            session.call([step(1)])
        # No other session is opened over the channel, only to find the worker gone.
        assert session.channel not in client._channels.all()
        assert run_steps(client, STEPS) == expected
        wait_until(lambda: len(worker._sessions) <= 1)


@pytest.mark.long
def test_a_full_queue_makes_no_storm(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bounce asks for all to be sent again: they are, but together, and not at once."""
    refused = 0
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        session = client.open_session()
        session.call([step(0)])
        relay = broker._relay

        def bounce(sender: Peer, header: headers.Relay, message: RoutedMessage) -> None:
            nonlocal refused
            if sender.role == "device" and refused < 100:
                refused += 1
                broker._delivery.refuse(sender, header, Refuse("full", "full", 0.0))
            else:
                relay(sender, header, message)

        monkeypatch.setattr(broker, "_relay", bounce)
        sent = client.transport.counters["messages_sent"]  # type: ignore[attr-defined]
        session.call([step(1 + i) for i in range(20)])
        assert client.transport.counters["messages_sent"] - sent < 250  # type: ignore[attr-defined]
        assert refused == 100


def test_what_peers_say_is_fit_for_a_terminal(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with setting.broker() as broker, setting.client(broker.address) as client:
        (peer,) = broker._peers.values()
        bait = "\x1b[2J\x07tiny\r\nroot# "
        worker = Candidate(bytes(16), headers.Service(bytes(32), 1, 2), bait, 1, "worker-1")
        monkeypatch.setattr(broker._opens, "candidates", lambda: [worker])
        broker._started -= 100
        with pytest.raises(NoWorker, match=r"served here: .*tiny") as caught:
            client.open_session()
        assert str(caught.value).isprintable()
        assert peer.role == "device"


# --- the worker, handed its messages by hand ---------------------------------------------------------------


class Bench:
    """A worker on a transport that keeps what it sends, and one device's channel and session with it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = new_peer_id("device-1")
        self.identity = setting.fleet.read_identity("device-1")
        self.transport = FakeTransport()
        self.worker = Worker(
            setting.body,
            setting.service,
            "tiny",
            setting.fleet.read_identity("worker-1"),
            setting.own_fleet(),
            self.transport,
            WorkerLimits(max_sessions=8),
        )
        self.worker.start()
        self.sessions = 100_000

    def verify(self, data: bytes, role: Role) -> Certificate:
        service = self.setting.service
        scope = ModelScope(service.root, service.first, service.last)
        fleet = self.setting.fleet
        return verify_certificate(
            data, operator_key=fleet.operator_key, roster=fleet.roster(), role=role, scope=scope
        )

    def deliver(self, header: headers.Header, body: bytes) -> str:
        """What a transport does with a message: the name of the error that it counts."""
        try:
            self.worker.on_message(headers.decode_header(headers.encode_header(header)), body)
        except (ProtocolError, AuthenticationError, Busy) as error:
            return type(error).__name__
        return ""

    def channel(self, number: int) -> Channel:
        handshake = DeviceHandshake(self.identity, self.verify, self.setting.service, "float32")
        self.worker.on_message(headers.Open(self.device, number, self.setting.service), handshake.hello)
        (_, answer) = self.transport.take()[-1]
        finish, channel = handshake.finish(answer)
        self.worker.on_message(self.header(headers.RelayKind.FINISH, number), finish)
        (header, body) = self.transport.take()[-1]
        assert isinstance(header, headers.Relay)
        channel.epoch_keys(0, 0).open(header, body)
        return channel

    def header(self, kind: headers.RelayKind, *numbers: int) -> headers.Relay:
        return headers.Relay(self.worker.id, self.device, kind, *numbers)

    def request(
        self,
        keys: EpochKeys,
        session: int,
        seq: int,
        payload: payloads.Payload,
        tensor: Any = b"",
        channel: int = 1,
        epoch: int = 0,
    ) -> tuple[headers.Relay, bytes]:
        header = self.header(headers.RelayKind.REQUEST, channel, session, epoch, seq, keys.next_counter())
        return header, keys.seal(header, encoding.encode_payload(payload, tensor, overhead=keys.tag_size))

    def replies(self, count: int = 1) -> list[tuple[Any, bytes]]:
        wait_until(lambda: len(self.transport.sent) >= count)
        return self.transport.take()


@pytest.fixture(scope="module")
def bench(setting: Setting) -> Iterator[Bench]:
    bench = Bench(setting)
    yield bench
    bench.worker.stop()


@pytest.fixture(scope="module")
def channel(bench: Bench) -> Channel:
    return bench.channel(1)


def test_a_refusal_comes_sealed_and_the_session_goes_on(bench: Bench, channel: Channel) -> None:
    keys = channel.epoch_keys(1000, 0)
    wrong: list[tuple[payloads.Payload, Any, str]] = [
        (payloads.Step("float32", 16, [payloads.Run(0, 0, [0])]), bytes(64), "malformed"),
        (payloads.Step("float32", 32, [payloads.Run(0, 5, [5])]), bytes(128), "malformed"),
        (payloads.Step("float32", 32, [payloads.Run(0, 0, [0])], [3]), bytes(128), "malformed"),
        (payloads.Step("float32", 32, [payloads.Run(0, 0, [99_999])]), bytes(128), "too-long"),
        (payloads.Step("float32", 32, [payloads.Run(4000, 0, [0])]), bytes(128), "malformed"),
        (payloads.Step("float32", 32, [payloads.Run(0, 0, [0])]), b"\xff" * 128, "non-finite"),
        # What does not fit is not even decoded.
        (payloads.Step("float32", 16, [payloads.Run(0, 0, [0])]), b"\xff" * 64, "malformed"),
        (payloads.CodedStep("float32", 16, [payloads.Run(0, 0, [0])], size=64), b"\xff" * 64, "malformed"),
        (payloads.Step("float32", 32, [payloads.Run(0, 5, [5])]), b"\xff" * 128, "malformed"),
        (payloads.Step("float32", 32, [payloads.Run(0, 0, [99_999])]), b"\xff" * 128, "too-long"),
        (payloads.Step("bfloat16", 32, [payloads.Run(0, 0, [0] * 100_000)]), bytes(6_400_000), "malformed"),
        (payloads.Fork(77, 0), b"", "malformed"),
        # Axes of images, for more runs than there are.
        (payloads.PlacedStep("float32", 32, [payloads.Run(0, 0, [0])], axes=[[], []]), bytes(128), "malformed"),
    ]
    for seq, (payload, tensor, reason) in enumerate(wrong):
        assert bench.deliver(*bench.request(keys, 1000, seq, payload, tensor)) == ""
        ((header, body),) = bench.replies()
        reply, _ = encoding.decode_payload(keys.open(header, body), encoding.reply_decoder)
        assert isinstance(reply, payloads.Refusal)
        assert reply.reason == reason, payload
    assert bench.deliver(*bench.request(keys, 1000, len(wrong), *step(0))) == ""
    ((header, body),) = bench.replies()
    assert isinstance(encoding.decode_payload(keys.open(header, body), encoding.reply_decoder)[0], payloads.Result)
    assert bench.deliver(*bench.request(keys, 1000, len(wrong) + 1, payloads.Close())) == ""


@pytest.mark.parametrize(
    ("name", "placed"), [("position-axes", {"axes": [[0, 1]]}), ("spans", {"spans": [payloads.Span(0, 0, 2)]})]
)
def test_a_model_for_texts_takes_no_images(bench: Bench, channel: Channel, name: str, placed: Any) -> None:
    """What its masks or positions do not have would only be slow; it is refused before a session is opened."""
    bench.sessions += 1
    payload = payloads.PlacedStep("float32", 32, [payloads.Run(0, 0, [0, 1])], **placed)
    opened = bench.request(channel.epoch_keys(bench.sessions, 0), bench.sessions, 0, payload, bytes(256))
    sessions = bench.worker.facts()["sessions"]
    assert bench.deliver(*opened) == ""
    ((header, body),) = bench.replies()
    reply, _ = encoding.decode_payload(channel.epoch_keys(0, 0).open(header, body), encoding.reply_decoder)
    assert isinstance(reply, payloads.Refusal)
    assert (reply.reason, reply.message) == ("malformed", f"the channel has no {name}")
    assert bench.worker.facts()["sessions"] == sessions
    assert len(bench.worker._sessions) == 0


def test_a_session_is_never_opened_twice(bench: Bench, channel: Channel) -> None:
    """Not even by a repetition of its first request: its keys would meet other plaintexts."""
    keys = channel.epoch_keys(2000, 0)
    first = bench.request(keys, 2000, 0, *step(0))
    bench.deliver(*first)
    (answer,) = bench.replies()
    bench.deliver(*first)
    assert bench.replies() == [answer]
    bench.deliver(*bench.request(keys, 2000, 1, payloads.Close()))
    for _ in range(3):
        bench.deliver(*first)
        told = refusal(bench, channel)
        assert (told.reason, told.session) == ("lost", 2000)
    # A close that comes before the first request counts as well.
    late = channel.epoch_keys(2001, 0)
    request = bench.request(late, 2001, 0, *step(0))
    bench.deliver(*bench.request(late, 2001, 1, payloads.Close()))
    bench.deliver(*request)
    assert bench.replies()[0][0].session == 0
    assert len(bench.worker._sessions) == 0


def test_a_higher_epoch_ends_lower_ones_at_once_and_for_good(bench: Bench, channel: Channel) -> None:
    """Over whichever channel of the device it comes; another device's session of the same number stays."""
    sessions, number = bench.worker._sessions, 2500
    second = bench.channel(60)
    old, new, newest = (each.epoch_keys(number, epoch) for each, epoch in ((channel, 0), (channel, 1), (second, 7)))
    first, late = bench.request(old, number, 0, *step(0)), bench.request(old, number, 1, *step(1))
    bench.deliver(*first)
    bench.replies()
    (holder,) = sessions._sessions.values()
    assert bench.deliver(*bench.request(new, number, 0, *step(0), epoch=1)) == ""
    bench.replies()
    assert [id_[3] for id_ in sessions._sessions] == [1]
    wait_until(lambda: not holder.state.holds_memory)
    for stale in (first, late):
        bench.deliver(*stale)
        assert refusal(bench, channel).reason == "lost"
    assert bench.deliver(*bench.request(newest, number, 0, *step(0), channel=60, epoch=7)) == ""
    bench.replies()
    assert list(sessions._sessions) == [(bench.device, 60, number, 7)]
    for epoch in (1, 6):
        keys = channel.epoch_keys(number, epoch)
        bench.deliver(*bench.request(keys, number, 0, *step(0), epoch=epoch))
        assert refusal(bench, channel).reason == "lost"
    assert len(sessions) == 1
    bench.deliver(*bench.request(newest, number, 1, payloads.Close(), channel=60, epoch=7))
    bench.deliver(*bench.request(channel.epoch_keys(number, 6), number, 0, *step(0), epoch=6))
    assert refusal(bench, channel).reason == "lost"
    assert len(sessions) == 0


def test_requests_out_of_order_are_refused_and_the_right_one_still_taken(bench: Bench, channel: Channel) -> None:
    keys = channel.epoch_keys(3000, 0)
    requests = [bench.request(keys, 3000, seq, *step(seq)) for seq in range(4)]
    assert bench.deliver(*requests[1]) == OutOfOrder.__name__
    assert bench.deliver(*requests[0]) == ""
    assert bench.deliver(*requests[2]) == OutOfOrder.__name__
    assert bench.deliver(*requests[1]) == bench.deliver(*requests[2]) == ""
    assert [header.seq for header, _ in bench.replies(3)] == [0, 1, 2]
    bench.deliver(*bench.request(keys, 3000, 3, payloads.Close()))


def test_what_follows_a_refused_first_request_is_refused(
    bench: Bench, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = channel.epoch_keys(3001, 0)
    first, second = [bench.request(keys, 3001, seq, *step(seq)) for seq in range(2)]
    monkeypatch.setattr(bench.worker, "_draining", True)
    bench.deliver(*first)
    assert refusal(bench, channel).reason == "busy"
    assert bench.deliver(*second) == ""
    assert refusal(bench, channel).reason == "lost"


@given(st.data())
@settings(max_examples=1200, deadline=None)
def test_no_message_makes_a_worker_fail(bench: Bench, channel: Channel, data: st.DataObject) -> None:
    """Damage of any field or byte of a good request: refused, or not answered, and never computed."""
    bench.sessions += 1
    number = bench.sessions
    keys = channel.epoch_keys(number, 0)
    good, body = bench.request(keys, number, 0, *step(0))
    bad: headers.Header = good
    spoiled = bytearray(body)
    match data.draw(st.sampled_from(["flip", "cut", "field", "kind", "open", "header"])):
        case "flip":
            spoiled[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del spoiled[data.draw(st.integers(0, len(body) - 1)) :]
        case "field":
            field = data.draw(st.sampled_from(["sender", "channel", "session", "epoch", "seq", "counter"]))
            value = data.draw(st.integers(0, 2**62 - 1).filter(lambda value: value != getattr(good, field)))
            bad = msgspec.structs.replace(good, **{field: b"another." if field == "sender" else value})
        case "kind":
            bad = msgspec.structs.replace(
                good,
                kind=data.draw(
                    st.sampled_from([headers.RelayKind.ANSWER, headers.RelayKind.REPLY, headers.RelayKind.UNKNOWN])
                ),
            )
        case "open":
            bad, spoiled = (
                headers.Open(bench.device, number + 10, bench.setting.service),
                bytearray(data.draw(st.binary())),
            )
        case "header":
            bad = data.draw(
                st.sampled_from([headers.Probe(), headers.RosterRequest(bytes(8)), headers.Bounce("gone")])
            )
    steps, held = bench.worker.counters["steps"], len(bench.worker._sessions)
    error = bench.deliver(bad, bytes(spoiled))
    assert error or isinstance(bad, headers.Bounce)
    assert len(bench.worker._sessions) == held
    assert all(
        isinstance(header, headers.Relay) and header.kind == headers.RelayKind.UNKNOWN
        for header, _ in bench.transport.take()
    )
    if number % 20 == 0:
        assert bench.deliver(good, body) == ""
        ((header, answer),) = bench.replies()
        assert isinstance(
            encoding.decode_payload(keys.open(header, answer), encoding.reply_decoder)[0], payloads.Result
        )
        bench.deliver(*bench.request(keys, number, 1, payloads.Close()))
        assert bench.worker.counters["steps"] == steps + 1


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_a_member_that_seals_garbage_is_refused_too(bench: Bench, channel: Channel, garbage: bytes) -> None:
    bench.sessions += 1
    number = 500_000 + bench.sessions
    keys = channel.epoch_keys(number, 0)
    header = bench.header(headers.RelayKind.REQUEST, 1, number, 0, 0, keys.next_counter())
    error = bench.deliver(header, keys.seal(header, garbage))
    assert error in ("Malformed", "Oversized") or not garbage.strip(b"\0\x01\x91\x03")
    bench.transport.take()


def refusal(bench: Bench, channel: Channel) -> payloads.Refusal:
    """What a worker says of a request that it did not take."""
    ((header, body),) = bench.replies()
    assert header.session == 0
    refusal, _ = encoding.decode_payload(channel.epoch_keys(0, 0).open(header, body), encoding.reply_decoder)
    assert isinstance(refusal, payloads.Refusal)
    return refusal


def test_a_queue_that_is_full_says_so(bench: Bench, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = channel.epoch_keys(4000, 0)
    first = bench.request(keys, 4000, 0, *step(0))
    with monkeypatch.context() as patch:
        limits = bench.worker._sessions.limits
        patch.setattr(bench.worker._sessions, "limits", replace(limits, max_queued_bytes=100))
        assert bench.deliver(*first) == ""
        told = refusal(bench, channel)
        assert (told.reason, told.session, told.seq) == ("full", 4000, 0)
        assert told.retry_after > 0
    bench.deliver(*first)
    assert bench.replies()[0][0].session == 4000
    bench.deliver(*bench.request(keys, 4000, 1, payloads.Close()))
    assert bench.worker._compute.queued_bytes == 0


def test_a_large_request_is_not_decrypted_for_a_full_queue(
    bench: Bench, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = channel.epoch_keys(4002, 0)
    header, _ = bench.request(keys, 4002, 0, payloads.Close())
    limits = bench.worker._sessions.limits
    monkeypatch.setattr(bench.worker._sessions, "limits", replace(limits, max_queued_bytes=100))
    assert bench.deliver(header, bytes(1 << 20)) == ""
    told = refusal(bench, channel)
    assert (told.reason, told.session, told.seq) == ("full", 4002, 0)
    assert bench.deliver(header, bytes(1 << 10)) == "AuthenticationError"


def test_replies_that_nobody_acknowledges_give_way(
    bench: Bench, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever asks for one again is told so, rather than waiting for ever."""
    keys = {number: channel.epoch_keys(number, 0) for number in (4400, 4401)}
    limits = bench.worker._sessions.limits
    first = bench.request(keys[4400], 4400, 0, *step(0))
    bench.deliver(*first)
    ((_, body),) = bench.replies()
    monkeypatch.setattr(bench.worker._sessions, "limits", replace(limits, max_replies=3 * len(body)))
    requests = [bench.request(keys[4401], 4401, seq, *step(seq)) for seq in range(3)]
    answers = []
    for request in requests:
        bench.deliver(*request)
        answers += bench.replies()
    bench.deliver(*requests[0])
    assert bench.replies() == answers[:1]
    bench.deliver(*first)
    told = refusal(bench, channel)
    assert (told.reason, told.session, told.seq) == ("lost", 4400, 0)
    for number, seq in ((4400, 1), (4401, 3)):
        bench.deliver(*bench.request(keys[number], number, seq, payloads.Close()))


def test_a_fork_into_a_session_that_has_rows_leaks_no_memory(bench: Bench, channel: Channel) -> None:
    store = bench.worker._body.store
    assert store is not None
    # What earlier tests have closed is freed before the next request is answered.
    wait_until(lambda: not bench.worker._sessions.closed)
    keys = {number: channel.epoch_keys(number, 0) for number in (4600, 4601)}
    bench.deliver(*bench.request(keys[4600], 4600, 0, *step(0)))
    bench.replies()
    before = store.free
    bench.deliver(*bench.request(keys[4601], 4601, 0, *step(0)))
    bench.replies()
    bench.deliver(*bench.request(keys[4601], 4601, 1, payloads.Fork(4600, 0)))
    ((header, body),) = bench.replies()
    told, _ = encoding.decode_payload(keys[4601].open(header, body), encoding.reply_decoder)
    assert isinstance(told, payloads.Refusal)
    assert told.reason == "malformed"
    bench.deliver(*bench.request(keys[4601], 4601, 2, payloads.Close()))
    wait_until(lambda: store.free == before)
    bench.deliver(*bench.request(keys[4600], 4600, 1, payloads.Close()))


def test_what_needs_no_forward_keeps_nobody_from_theirs(
    bench: Bench, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One session sends its next request as soon as it is answered, so that there is always one to take in."""
    compute, flood, honest = bench.worker._compute, channel.epoch_keys(4500, 0), channel.epoch_keys(4501, 0)
    reply, seq, last = compute._reply, itertools.count(), time.monotonic() + 3 * LATE
    over, ended = threading.Event(), threading.Event()

    def send() -> None:
        bench.deliver(*bench.request(flood, 4500, next(seq), payloads.Fork(77, 0)))

    def answer(request: PendingRequest, payload: payloads.Payload, tensor: Any) -> None:
        reply(request, payload, tensor)
        if request.header.session == 4500:
            ended.set() if over.is_set() or time.monotonic() > last else send()

    monkeypatch.setattr(compute, "_reply", answer)
    send()
    bench.deliver(*bench.request(honest, 4501, 0, *step(0)))
    wait_until(lambda: any(header.session == 4501 for header, _ in list(bench.transport.sent)))
    over.set()
    assert ended.wait(LATE)
    for number, keys, after in ((4500, flood, next(seq)), (4501, honest, 1)):
        bench.deliver(*bench.request(keys, number, after, payloads.Close()))
    bench.transport.take()


def test_the_oldest_set_up_may_be_finished_after_a_damaged_attempt(bench: Bench) -> None:
    handshake = DeviceHandshake(bench.identity, bench.verify, bench.setting.service, "float32")
    bench.deliver(headers.Open(bench.device, 50, bench.setting.service), handshake.hello)
    bench.deliver(headers.Open(bench.device, 50, bench.setting.service), handshake.hello)
    (_, one), (_, two) = bench.transport.take()
    assert one == two, "an open that is delivered twice must have one answer"
    finish, _ = handshake.finish(one)
    for damaged in (b"", finish[:-1], bytes(len(finish))):
        assert bench.deliver(bench.header(headers.RelayKind.FINISH, 50), damaged) == "AuthenticationError"
    assert bench.deliver(bench.header(headers.RelayKind.FINISH, 50), finish) == ""
    assert bench.deliver(bench.header(headers.RelayKind.FINISH, 50), finish) == ""
    kinds = [header.kind for header, _ in bench.transport.take()]  # type: ignore[attr-defined]
    assert kinds == [headers.RelayKind.REPLY] * 2


# --- the device, handed its messages by hand ---------------------------------------------------------------


@given(st.data())
@settings(max_examples=1000, deadline=None)
def test_no_message_makes_a_device_fail(device: tuple[Client, Any], data: st.DataObject) -> None:
    client, session = device
    header = data.draw(
        st.one_of(
            st.builds(
                headers.Relay,
                st.just(client.id),
                st.sampled_from([session.worker, bytes(8)]),
                st.sampled_from(
                    [
                        headers.RelayKind.ANSWER,
                        headers.RelayKind.FINISH,
                        headers.RelayKind.REQUEST,
                        headers.RelayKind.REPLY,
                    ]
                ),
                st.sampled_from([0, 1, session.channel.number, 99]),
                st.sampled_from([0, 1, session.ref, 99]),
                st.sampled_from([0, 1]),
                st.integers(0, 5),
                st.integers(0, 2**62 - 1),
            ),
            st.builds(
                headers.Bounce, st.sampled_from(["busy", "full", "no-worker"]), st.integers(0, 3), st.integers(0, 3)
            ),
            st.just(headers.Probe()),
            st.just(headers.Open(bytes(8), 1, headers.Service(bytes(32), 0, 1))),
        )
    )
    with contextlib.suppress(ProtocolError, AuthenticationError):
        client.on_message(header, data.draw(st.binary(max_size=100)))
    # Nothing is in flight: nothing may pile up.
    assert session.events.empty()
    assert not session.ended


@pytest.fixture(scope="module")
def device(setting: Setting) -> Iterator[tuple[Client, Any]]:
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        session = client.open_session()
        session.call([step(0)])
        yield client, session
        session.call([step(1)])


# --- ten thousand frames for each --------------------------------------------------------------------------

#: Frames for each of broker, worker and device.
FRAMES = 10_000

Frame = tuple[bytes, bytes]


def flood(honest: list[Frame], foreign: list[Frame], seed: int) -> Iterator[tuple[str, bytes, bytes]]:
    """Corrupted, truncated, mixed, replayed, reordered and foreign frames, made of honest ones."""
    choose = random.Random(seed)
    for _ in range(FRAMES):
        kind = choose.choice(["corrupt head", "corrupt body", "cut head", "cut body", "mix", "replay", "foreign"])
        head, body = choose.choice(foreign if kind == "foreign" else honest)
        damaged = bytearray(head if kind.endswith("head") else body)
        at = choose.randrange(len(damaged))
        if kind.startswith("corrupt"):
            damaged[at] ^= 1 << choose.randrange(8)
        elif kind.startswith("cut"):
            del damaged[at:]
        elif kind == "mix":
            damaged[:] = choose.choice([other for _, other in honest if other != body])
        yield kind, *((bytes(damaged), body) if kind.endswith("head") else (head, bytes(damaged)))


def take(handler: Any, head: bytes, body: bytes) -> bool:
    """What a link does with a frame; whether it was refused."""
    try:
        handler.on_message(headers.decode_header(head), headers.check_body(body))
    except (ProtocolError, AuthenticationError, Busy):
        return True
    return False


def test_a_flood_does_not_reach_what_a_worker_computes(bench: Bench, channel: Channel) -> None:
    number = 800_000
    keys, other = channel.epoch_keys(number, 0), bench.channel(70).epoch_keys(number, 0)
    honest = [bench.request(keys, number, seq, *step(seq)) for seq in range(20)]
    # Sealed for another channel.
    foreign = []
    for seq in range(20):
        header, body = bench.request(other, number, seq, *step(seq), channel=70)
        foreign.append((changed(header, channel=1), body))
    for header, body in honest:
        assert bench.deliver(header, body) == ""
    answers = {header.seq: body for header, body in bench.replies(20)}
    steps, held = bench.worker.counters["steps"], len(bench.worker._sessions)
    frames = [(headers.encode_header(header), body) for header, body in honest]
    refused = sent = 0
    for kind, head, body in flood(frames, foreign, 1):
        refused += (was_refused := take(bench.worker, head, body))
        for header, sealed in bench.transport.take():
            assert isinstance(header, headers.Relay)
            # To what it has answered it gives the same answer; of channels that it has not it says so.
            again = header.kind == headers.RelayKind.REPLY and header.session == number
            assert not again or sealed == answers[header.seq]
            sent += again
        assert was_refused or kind not in ("corrupt body", "cut body", "foreign")
    assert refused > FRAMES // 2
    assert sent > 0
    assert bench.worker.counters["withheld"] > 0
    assert (bench.worker.counters["steps"], len(bench.worker._sessions)) == (steps, held)
    assert bench.deliver(*bench.request(keys, number, 20, *step(20))) == ""
    ((header, body),) = bench.replies()
    assert isinstance(encoding.decode_payload(keys.open(header, body), encoding.reply_decoder)[0], payloads.Result)
    bench.deliver(*bench.request(keys, number, 21, payloads.Close()))


def test_a_flood_does_not_reach_a_generation(setting: Setting, expected: list[bytes]) -> None:
    """Every reply of one session, and another's, are turned against a session while it runs."""
    seen: list[Frame] = []

    def watch(peer: Peer, header: headers.AnyHeader, message: RoutedMessage) -> list[RoutedMessage]:
        if peer.role == "device" and isinstance(header, headers.Relay):
            seen.append((bytes(message[0]), bytes(message[1])))
        return [message]

    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        cheat(broker, watch)
        assert run_steps(client, STEPS) == expected
        foreign, seen[:] = list(seen), []
        session = client.open_session()
        answers = [session.call([step(0, 7)])]
        answers += [session.call([step(7 + i)]) for i in range(STEPS // 2)]
        frames = flood(list(seen), foreign, 2)
        refused = 0
        for i in range(STEPS // 2, STEPS):
            if i == STEPS - 1:
                batch = list(frames)
            else:
                batch = [frame for frame, _ in zip(frames, range(200), strict=False)]
            for _, head, body in batch:
                refused += take(client, head, body)
            answers.append(session.call([step(7 + i)]))
        assert [bytes(tensor) for ((_, tensor),) in answers] == expected
        assert session.events.empty()
        assert refused > FRAMES // 10
        assert client.counters["late"] > FRAMES // 10
        session.close()


# --- a member that takes all it can get --------------------------------------------------------------------


def test_a_member_that_takes_a_whole_worker_gives_way_to_another(
    setting: Setting, expected: list[bytes], tmp_path: Path
) -> None:
    """None of its sessions is idle."""
    setting = Setting(tmp_path, setting.checkpoint)
    setting.fleet.add_member("device", "device-2")
    with (
        setting.broker() as broker,
        setting.worker(broker.address, max_sessions=3) as worker,
        setting.client(broker.address, "device-2") as hog,
        setting.client(broker.address) as client,
    ):
        sessions = [hog.open_session() for _ in range(3)]
        for session in sessions:
            session.call([step(0)])
        with pytest.raises(Busy):
            hog.open_session().call([step(0)])
        session = client.open_session()
        assert run_steps(client, STEPS, session=session) == expected
        assert worker.counters["refused_busy"] == 1
        with pytest.raises(SessionLost):
            sessions[2].call([step(1)])
        for other in sessions[:2]:
            other.call([step(1)])


# --- a worker that lies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [payloads.Done(), payloads.Refusal("failed", "\x1b[31m")])
def test_a_wrong_kind_of_answer_ends_the_session(setting: Setting, reply: payloads.Payload) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        worker._compute._reply = lambda request, *_: worker._reply(request.session.keys, request.header, reply)
        session = client.open_session()
        with pytest.raises(SessionLost) as caught:
            session.call([step(0)])
        assert str(caught.value).isprintable()
        assert session.ended
        wait_until(lambda: len(worker._sessions) == 0)


def test_states_that_are_not_finite_do_not_reach_the_model(setting: Setting) -> None:
    def poison(request: PendingRequest, *_: Any) -> None:
        tokens = request.tokens
        states = torch.full((tokens, 32), float("nan"))
        result = payloads.Result("float32", tokens, 32)
        worker._reply(request.session.keys, request.header, result, memoryview(states.numpy().tobytes()))

    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        SplitModelForCausalLM.from_pretrained(
            setting.checkpoint, broker=broker.address, keys=setting.fleet.path
        ) as model,
    ):
        worker._compute._reply = poison
        with pytest.raises(NonFinite):
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_an_unforeseen_failure_of_a_step_is_told_and_ends_its_session_alone(
    setting: Setting, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as worker,
        setting.client(broker.address) as client,
    ):
        bystander = client.open_session()
        assert bytes(bystander.call([step(0, 7)])[0][1]) == expected[0]
        with monkeypatch.context() as patch:
            patch.setattr(setting.body, "launch", lambda *_: 1 / 0)
            began = time.monotonic()
            with pytest.raises(SessionLost, match="ZeroDivisionError"):
                client.open_session().call([step(0), step(1), step(2)])
            assert time.monotonic() - began < SOON < STEP_TIMEOUT
        assert bytes(bystander.call([step(7)])[0][1]) == expected[1]
        assert worker.counters["refused_failed"] == 1


def test_a_flood_of_requests_for_no_session_is_left_unread(setting: Setting, expected: list[bytes]) -> None:
    with (
        setting.broker() as broker,
        setting.worker(broker.address, stray_rate=0.0, stray_burst=50.0) as worker,
        setting.client(broker.address) as client,
    ):
        session = client.open_session()
        answers = [session.call([step(0, 7)])]
        wait_until(lambda: worker._channels.open)
        [(sender, number)] = worker._channels.open
        closing = headers.Relay(worker.id, sender, headers.RelayKind.REQUEST, number, 10**6, 0, 0, 1)
        # Sessions that are open are not affected.
        for _ in range(100):
            worker_take(worker, closing, bytes(100))
        answers += [session.call([step(7 + i)]) for i in range(5)]
        assert [bytes(tensor) for ((_, tensor),) in answers] == expected[:6]
        assert worker.counters["too_often"] >= 50


def worker_take(worker: Worker, header: headers.Relay, body: bytes) -> None:
    """Hands a worker a message as its transport does."""
    with contextlib.suppress(AuthenticationError):
        worker.on_message(header, body)
