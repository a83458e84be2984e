"""The set-up of channels between peers of different versions and capabilities: recorded ones, and live ones."""

from __future__ import annotations

import copy
import functools
import os
import sys
from pathlib import Path

import msgspec
import nacl.bindings as sodium
import pytest
import torch
from transformers import DynamicCache

import fleet
import tiny
from recorded import (
    DEVICE,
    GOLDEN,
    OPERATOR_KEY,
    REPLY,
    REQUEST,
    SCOPE,
    SERVICE,
    WORKER,
    check_bytes,
    read_bytes,
)
from split_common.errors import (
    AuthenticationError,
    BrokerUnreachable,
    Malformed,
    SessionLost,
    UnsupportedFeature,
    VersionMismatch,
)
from split_common.protocol import handshake, headers, payloads
from split_common.protocol.capabilities import CAPABILITIES
from split_common.protocol.channel import AEGIS, XCHACHA, Channel
from split_common.protocol.handshake import (
    MAX_CAPABILITIES,
    VERSION_1_CAPABILITIES,
    Answer,
    DeviceHandshake,
    Hello,
    WorkerHandshake,
)
from split_common.trust.keys import Certificate, Role, verify_certificate
from split_device.sessions import channels
from split_worker import worker as worker_module
from wiretap import Setting, run_steps, step

ALL = frozenset({"fork", "int4", "int8"})
#: A peer with these lacks two of them, and has one that the other end did not know when frames were recorded.
SOME = frozenset({"int8", "trees"})
#: One that no other end knows.
FEW = frozenset({"int8", "telepathy"})


@pytest.fixture(params=[AEGIS, XCHACHA], ids=lambda suite: suite.name)
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The only cipher that both ends have."""
    monkeypatch.setattr(handshake, "preferred_suites", lambda: [request.param.name])
    return request.param.name  # type: ignore[no-any-return]


def draw_ephemeral_key(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The next ephemeral keys come from a seed: 1 is the device's, 2 the worker's."""
    pair = sodium.crypto_kx_seed_keypair(bytes([seed]) * 32)
    monkeypatch.setattr(sodium, "crypto_kx_keypair", lambda: pair)


def verify(data: bytes, role: Role) -> Certificate:
    return verify_certificate(data, operator_key=OPERATOR_KEY, roster=None, role=role, scope=SCOPE)


def device(capabilities: frozenset[str] = ALL) -> DeviceHandshake:
    return DeviceHandshake(DEVICE, verify, SERVICE, "bfloat16", capabilities)


def worker(hello: bytes, capabilities: frozenset[str] = ALL) -> WorkerHandshake:
    return WorkerHandshake(WORKER, verify, SERVICE, hello, capabilities)


def sealed(of_device: Channel, of_worker: Channel) -> dict[str, bytes]:
    return {
        "sealed-request": of_device.epoch_keys(6, 7).seal(REQUEST, b"request"),
        "sealed-reply": of_worker.epoch_keys(6, 7).seal(REPLY, b"reply"),
    }


# --- recorded peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of_device", "of_worker"),
    [("version-2", ALL, ALL), ("version-2-int8-worker", ALL, SOME), ("version-2-int8-device", SOME, ALL)],
    ids=["equals", "worker-with-less", "device-with-less"],
)
def test_set_ups_of_version_2(
    name: str, of_device: frozenset[str], of_worker: frozenset[str], suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_ephemeral_key(monkeypatch, 1)
    initiator = device(of_device)
    draw_ephemeral_key(monkeypatch, 2)
    responder = worker(initiator.hello, of_worker)
    finish, to_worker = initiator.finish(responder.answer)
    to_device = responder.finish(finish)
    messages = {"hello": initiator.hello, "answer": responder.answer, "finish": finish}
    check_bytes(f"channel-{name}-{suite}", messages | sealed(to_worker, to_device))
    assert to_worker.capabilities == to_device.capabilities == of_device & of_worker


def test_a_worker_understands_a_device_of_version_1(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device and a worker of version 1 said to each other, recorded from that version."""
    golden = read_bytes(GOLDEN / f"channel-version-1-{suite}.hex")
    draw_ephemeral_key(monkeypatch, 2)
    responder = worker(golden["hello"])
    assert responder.answer == golden["answer"]
    to_device = responder.finish(golden["finish"])
    assert to_device.capabilities == VERSION_1_CAPABILITIES
    assert to_device.epoch_keys(6, 7).open(REQUEST, golden["sealed-request"]) == b"request"
    assert to_device.epoch_keys(6, 7).seal(REPLY, b"reply") == golden["sealed-reply"]


def test_a_device_understands_a_worker_of_version_1(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker of version 1 answered to a hello of version 2, recorded from that version."""
    golden = read_bytes(GOLDEN / f"channel-version-1-worker-{suite}.hex")
    draw_ephemeral_key(monkeypatch, 1)
    initiator = device(ALL | {"trees"})
    assert initiator.hello == golden["hello"]
    finish, to_worker = initiator.finish(golden["answer"])
    assert finish == golden["finish"]
    assert to_worker.capabilities == VERSION_1_CAPABILITIES
    assert to_worker.epoch_keys(6, 7).open(REPLY, golden["sealed-reply"]) == b"reply"
    assert to_worker.epoch_keys(6, 7).seal(REQUEST, b"request") == golden["sealed-request"]


def test_peers_of_a_later_version_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """They append fields, which are ignored here, and take this version's part in the set-up."""
    initiator = device(ALL - {"int4"})
    initiator.hello = later(initiator.hello, 4)
    responder = worker(initiator.hello)
    finish, to_worker = initiator.finish(responder.answer)
    assert to_worker.capabilities == responder.finish(finish).capabilities == ALL - {"int4"}
    initiator = device()
    monkeypatch.setattr(handshake, "SETUP_VERSION", 3)
    responder = worker(initiator.hello)
    finish, to_worker = initiator.finish(later(responder.answer, 3))
    assert to_worker.capabilities == responder.finish(finish).capabilities == ALL


def later(message: bytes, version_at: int) -> bytes:
    """A message of version 3 that has a field more."""
    fields = msgspec.msgpack.decode(message)
    fields[version_at] = 3
    return msgspec.msgpack.encode([*fields, "more"])


# --- tampering ---------------------------------------------------------------------------------------------


def reworded(message: bytes, what: str, first: int) -> bytes:
    """A message whose version or capabilities, which follow the first fields, are changed."""
    fields = msgspec.msgpack.decode(message)
    assert fields[first:] == [2, ["fork", "int4", "int8"]]
    fields[first:] = {
        "fields": [],
        "version": [1, fields[-1]],
        "all capabilities": [2, []],
        "a capability": [2, ["fork", "int4"]],
        "one more": [2, ["fork", "int4", "int8", "trees"]],
        "the older version": [3, fields[-1]],
    }[what]
    return msgspec.msgpack.encode(fields)


CHANGES = ["fields", "version", "all capabilities", "a capability", "one more", "the older version"]


@pytest.mark.parametrize("what", CHANGES)
def test_nobody_between_can_change_what_a_device_says_it_can(what: str) -> None:
    initiator = device()
    responder = worker(reworded(initiator.hello, what, 4))
    with pytest.raises(AuthenticationError):
        initiator.finish(responder.answer)


@pytest.mark.parametrize("what", CHANGES)
def test_nobody_between_can_change_what_a_worker_says_it_can(what: str) -> None:
    initiator = device()
    responder = worker(initiator.hello)
    with pytest.raises(AuthenticationError):
        initiator.finish(reworded(responder.answer, what, 3))
    # The right answer still ends the set-up.
    responder.finish(initiator.finish(responder.answer)[0])


@pytest.mark.parametrize(
    "names",
    [
        ["int8", "fork"],
        ["fork", "fork"],
        ["Fork"],
        [""],
        ["x" * 33],
        ["fork\n"],
        [f"x{index:03}" for index in range(MAX_CAPABILITIES + 1)],
        [7],
    ],
    ids=["disordered", "twice", "capital", "empty", "long", "newline", "many", "number"],
)
def test_wrong_capabilities_are_malformed(names: list[str]) -> None:
    initiator = device()
    hello, answer = (
        msgspec.msgpack.decode(message) for message in (initiator.hello, worker(initiator.hello).answer)
    )
    with pytest.raises(Malformed):
        worker(msgspec.msgpack.encode([*hello[:-1], names]))
    with pytest.raises(Malformed):
        initiator.finish(msgspec.msgpack.encode([*answer[:-1], names]))


def test_as_many_capabilities_as_are_allowed_may_be_unknown() -> None:
    names = frozenset(f"{index:02}{'x' * 30}" for index in range(MAX_CAPABILITIES))
    initiator = device(names)
    finish, to_worker = initiator.finish(worker(initiator.hello).answer)
    assert finish
    assert to_worker.capabilities == set()


def test_both_sides_name_what_this_version_has() -> None:
    initiator = DeviceHandshake(DEVICE, verify, SERVICE, "bfloat16")
    responder = WorkerHandshake(WORKER, verify, SERVICE, initiator.hello)
    hello = msgspec.msgpack.decode(initiator.hello, type=Hello)
    answer = msgspec.msgpack.decode(responder.answer, type=Answer)
    assert hello.capabilities == answer.capabilities == sorted(CAPABILITIES)
    assert CAPABILITIES >= VERSION_1_CAPABILITIES


def test_requests_say_what_they_need() -> None:
    numbers, times = payloads.Array("int8", [1, 1]), payloads.Array("float32", [1, 1])
    assert payloads.Step("float32", 1, [payloads.Run(0, 0, [0])]).needs == set()
    placed = payloads.PlacedStep("float32", 1, [payloads.Run(0, 0, [0])])
    assert placed.needs == set()
    assert msgspec.structs.replace(placed, axes=[[1, 2]]).needs == {"position-axes"}
    assert msgspec.structs.replace(placed, spans=[payloads.Span(0, 0, 2)]).needs == {"spans"}
    brief = payloads.BriefStep("float32", 1, [payloads.Run(0, 0, [0])], codec="exact", size=4)
    assert brief.needs == {"outputs"}
    assert msgspec.structs.replace(brief, codec="int8").needs == {"outputs", "states-int8"}
    sized = payloads.PaddedStep("float32", 1, [payloads.Run(0, 0, [0])], codec="exact", size=4, padded=4)
    assert sized.needs == {"outputs", "padded-steps"}
    tree = payloads.TreeStep("float32", 1, [payloads.Run(0, 0, [0])], codec="exact", size=4, outputs=[0])
    assert tree.needs == {"outputs", "padded-steps", "trees"}
    assert payloads.Fork(1, 0).needs == {"fork"}
    assert payloads.Denoise(None, [-1], [times, times], "float16").needs == set()
    assert payloads.Denoise(None, [-1], [numbers, times], "int4").needs == {"int8", "int4"}


# --- over a queue ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


class Version1Device(DeviceHandshake):
    """What a device of version 1 sends; the answer to it is of version 1, and is taken as such."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.hello = msgspec.msgpack.encode(msgspec.msgpack.decode(self.hello)[:4])


class Version1Worker(WorkerHandshake):
    """What a worker of version 1 answers, though the hello is of version 2."""

    def __init__(self, *arguments: object, **options: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            decode = handshake._decode
            patch.setattr(handshake, "_decode", lambda message, type_: version_1(decode(message, type_)))
            super().__init__(*arguments, **options)  # type: ignore[arg-type]


def version_1(message: object) -> object:
    return msgspec.structs.replace(message, version=1) if isinstance(message, Hello) else message


@pytest.mark.parametrize("old", ["device", "worker"])
def test_a_fleet_may_be_updated_one_machine_at_a_time(
    old: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.broker() as broker, setting.worker(broker.address):
        with setting.client(broker.address) as client:
            expected = run_steps(client, 3)
        if old == "device":
            monkeypatch.setattr(channels, "DeviceHandshake", Version1Device)
        else:
            monkeypatch.setattr(worker_module, "WorkerHandshake", Version1Worker)
        with setting.client(broker.address) as client:
            session = client.open_session()
            assert session.channel.crypto.capabilities == VERSION_1_CAPABILITIES
            assert run_steps(client, 3, session=session) == expected


IMAGE = payloads.Denoise(None, [-1], [payloads.Array("int4", [1, 1]), payloads.Array("float32", [1, 1])], "float32")


def test_what_a_worker_lacks_is_not_asked_of_it(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = functools.partial(WorkerHandshake, capabilities=FEW)
    monkeypatch.setattr(worker_module, "WorkerHandshake", limited)
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        session = client.open_session()
        assert session.channel.crypto.capabilities == {"int8"}
        session.call([step(0, 7)])
        with pytest.raises(SessionLost, match="does not copy sessions"):
            session.fork(client.name_session(), 0)
        with pytest.raises(UnsupportedFeature, match="worker 'worker-1' does not support int4: it runs an older"):
            session.call([(IMAGE, bytes(IMAGE.tensor_bytes))])
        # Nothing of it was sent: the session goes on.
        assert session.call([step(7, 1)])


def test_a_cache_is_copied_from_the_history_where_the_worker_makes_no_copies(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.arange(3, 12)[None]
    greedy = {"do_sample": False, "max_new_tokens": 6}
    monkeypatch.setattr(worker_module, "WorkerHandshake", functools.partial(WorkerHandshake, capabilities=FEW))
    with fleet.split_model(setting.checkpoint) as model:
        expected = model.generate(prompt, **greedy).tolist()
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt[:, :-1], past_key_values=cache)
        replays = model._client.counters["replays"]
        for copied in (copy.deepcopy(cache), cache):
            assert model.generate(prompt, past_key_values=copied, **greedy).tolist() == expected
        assert model._client.counters["replays"] == replays + 1


@pytest.mark.parametrize("old", ["device", "worker", None])
def test_sessions_have_keys_where_both_ends_know_them(
    old: str | None, setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited = {"capabilities": ALL}
    if old == "device":
        monkeypatch.setattr(channels, "DeviceHandshake", functools.partial(DeviceHandshake, **limited))
    elif old == "worker":
        monkeypatch.setattr(worker_module, "WorkerHandshake", functools.partial(WorkerHandshake, **limited))
    caplog.set_level("INFO", "split_worker.sessions")
    with setting.broker() as broker, setting.worker(broker.address), setting.client(broker.address) as client:
        first = client.open_session(identity=client.name_session("req-1"))
        session = client.open_session(identity=client.name_session("req-1"))
        first.call([step(0, 7)])
        assert len(run_steps(client, 2, session=session)) == 3
        copy = first.fork(client.name_session("req-1"), 0)
        assert copy.call([step(7, 1)])
    if old is None:
        assert len({first.ref, session.ref, copy.ref}) == 3
        assert first.ref == first.identity.key
        label = first.identity.key.hex()[:8]
    else:
        assert [first.ref, session.ref, copy.ref] == [1, 2, 3]
        label = "1"
    assert f"session {label} of device device-1 opened" in caplog.messages
    assert "req-1" not in caplog.text


def test_an_older_broker_is_noticed_before_anything_is_asked(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with setting.broker() as broker:
        decode = headers.decode_header

        def decode_version_1(frame: bytes) -> headers.AnyHeader:
            if frame[0] != headers.VERSION_1:
                raise VersionMismatch("the peer speaks protocol version 2, this is version 1")
            return decode(frame)

        monkeypatch.setattr(headers, "decode_header", decode_version_1)
        with (
            pytest.raises(BrokerUnreachable, match="in this version or a later one"),
            setting.client(broker.address, timeout=0.5),
        ):
            pass
        assert broker.counters["VersionMismatch"] > 0


def test_a_worker_refuses_what_was_not_agreed_on(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = functools.partial(WorkerHandshake, capabilities=FEW)
    monkeypatch.setattr(worker_module, "WorkerHandshake", limited)
    monkeypatch.setattr(Channel, "require", lambda *_: None)
    with (
        setting.broker() as broker,
        setting.worker(broker.address) as served,
        setting.client(broker.address) as client,
    ):
        with pytest.raises(Malformed, match="the channel has no int4"):
            client.open_session().call([(IMAGE, bytes(IMAGE.tensor_bytes))])
        assert served.counters["refused_malformed"] == 1


if __name__ == "__main__":
    os.environ["LAMBDA_SPLIT_ADD_GOLDEN"] = "1"
    sys.exit(pytest.main([str(Path(__file__))]))
