"""The encrypted channel: two members of one fleet understand each other, and nobody else is understood."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from split_common.errors import AuthenticationError, CertificateError, Malformed, ProtocolError
from split_common.protocol import handshake, headers
from split_common.protocol.channel import AEGIS, XCHACHA, Channel, EpochKeys, Suite
from split_common.protocol.handshake import Answer, DeviceHandshake, Hello, WorkerHandshake
from split_common.trust.keys import Certificate, Identity, Member, ModelScope, Role, Roster, verify_certificate

OPERATOR = SigningKey(bytes(32))
SERVICE = headers.Service(b"r" * 32, 2, 28)
NOW = int(time.time())


def issue(role: Role, name: str, operator: SigningKey = OPERATOR, **changes: object) -> Identity:
    def certify(sign_key: bytes, curve_key: bytes) -> Certificate:
        plain = Certificate(role, name, sign_key, curve_key, NOW - 60, NOW + 3600)
        return msgspec.structs.replace(plain, **changes)

    return Identity.issue(operator, certify)


DEVICE, WORKER = issue("device", "device-1"), issue("worker", "worker-1")


def roster(*identities: Identity, revoked: str = "") -> Roster:
    certificates = [identity.certificate for identity in identities]
    return Roster(
        1, NOW, tuple(Member(c.name, c.role, c.sign_key, c.curve_key, c.name == revoked) for c in certificates)
    )


class Verify:
    def __init__(self, listed: Roster) -> None:
        self.roster = listed

    def __call__(self, data: bytes, role: Role) -> Certificate:
        scope = ModelScope(SERVICE.root, SERVICE.first, SERVICE.last)
        operator_key = bytes(OPERATOR.verify_key)
        return verify_certificate(data, operator_key=operator_key, roster=self.roster, role=role, scope=scope)


VERIFY = Verify(roster(DEVICE, WORKER))


def shake_hands(
    device: Identity = DEVICE, worker: Identity = WORKER, verify: Verify = VERIFY
) -> tuple[Channel, Channel]:
    initiator = DeviceHandshake(device, verify, SERVICE, "bfloat16")
    responder = WorkerHandshake(worker, verify, SERVICE, initiator.hello)
    finish, of_device = initiator.finish(responder.answer)
    return of_device, responder.finish(finish)


@pytest.fixture(params=[AEGIS, XCHACHA], ids=lambda suite: suite.name)
def suite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setattr(handshake, "preferred_suites", lambda: [request.param.name])
    return request.param  # type: ignore[no-any-return]


def request_header(counter: int = 1, session: headers.SessionRef = 3) -> headers.Relay:
    return headers.Relay(b"worker..", b"device..", headers.RelayKind.REQUEST, 5, session, 0, 9, counter)


def test_both_ends_know_each_other_and_share_keys(suite: Suite) -> None:
    of_device, of_worker = shake_hands()
    assert (of_device.peer, of_worker.peer) == (WORKER.certificate, DEVICE.certificate)
    assert of_device.suite is of_worker.suite is suite
    one, other = of_device.epoch_keys(3, 0), of_worker.epoch_keys(3, 0)
    header = request_header(one.next_counter())
    sealed = one.seal(header, b"hidden states")
    assert b"hidden" not in sealed
    assert len(sealed) == len(b"hidden states") + suite.tag_size
    assert other.open(header, sealed) == b"hidden states"
    back = msgspec.structs.replace(header, kind=headers.RelayKind.REPLY, counter=other.next_counter())
    assert one.open(back, other.seal(back, b"answer")) == b"answer"


@pytest.mark.parametrize("name", ["channel", "session", "epoch", "seq", "counter", "kind"])
def test_what_a_body_belongs_to_cannot_be_changed(suite: Suite, name: str) -> None:
    of_device, of_worker = shake_hands()
    one, other = of_device.epoch_keys(3, 0), of_worker.epoch_keys(3, 0)
    header = request_header(one.next_counter())
    sealed = one.seal(header, b"x")
    wrong = msgspec.structs.replace(header, **{name: headers.RelayKind.REPLY if name == "kind" else 8})
    with pytest.raises(AuthenticationError):
        other.open(wrong, sealed)


def test_sessions_epochs_directions_and_channels_have_different_keys(suite: Suite) -> None:
    of_device, of_worker = shake_hands()
    header = request_header()
    sealed = of_device.epoch_keys(3, 0).seal(header, b"x")
    strangers = [
        of_worker.epoch_keys(4, 0),
        of_worker.epoch_keys(3, 1),
        of_worker.epoch_keys(0, 0),
        of_device.epoch_keys(3, 0),
        shake_hands()[1].epoch_keys(3, 0),
    ]
    for keys in strangers:
        with pytest.raises(AuthenticationError):
            keys.open(header, sealed)
    assert of_worker.epoch_keys(3, 0).open(header, sealed) == b"x"


def test_the_version_of_the_protocol_is_authenticated(monkeypatch: pytest.MonkeyPatch) -> None:
    of_device, of_worker = shake_hands()
    header = request_header()
    sealed = of_device.epoch_keys(3, 0).seal(header, b"x")
    monkeypatch.setattr(headers, "VERSION_1", 3)
    with pytest.raises(AuthenticationError):
        of_worker.epoch_keys(3, 0).open(header, sealed)


def test_a_session_key_is_authenticated_and_has_keys_of_its_own() -> None:
    of_device, of_worker = shake_hands()
    key, other = bytes(range(16)), bytes(range(1, 17))
    header = request_header(session=key)
    sealed = of_device.epoch_keys(key, 0).seal(header, b"x")
    assert of_worker.epoch_keys(key, 0).open(header, sealed) == b"x"
    for keys in (of_worker.epoch_keys(other, 0), of_worker.epoch_keys(key, 1)):
        with pytest.raises(AuthenticationError):
            keys.open(header, sealed)
    with pytest.raises(AuthenticationError):
        of_worker.epoch_keys(key, 0).open(msgspec.structs.replace(header, session=other), sealed)


def test_no_nonce_is_given_twice_to_any_thread() -> None:
    keys = shake_hands()[0].epoch_keys(1, 0)
    drawn: list[int] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend([keys.next_counter() for _ in range(5000)])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == len(drawn) == 20_000


_KEYS: list[tuple[EpochKeys, EpochKeys]] = []


@given(st.binary(max_size=100), st.data())
@settings(max_examples=1000, deadline=None)
def test_damaged_bodies_fail_authentication(plaintext: bytes, data: st.DataObject) -> None:
    if not _KEYS:
        of_device, of_worker = shake_hands()
        _KEYS.append((of_device.epoch_keys(1, 0), of_worker.epoch_keys(1, 0)))
    one, other = _KEYS[0]
    header = request_header(one.next_counter(), session=1)
    sealed = bytearray(one.seal(header, plaintext))
    index = data.draw(st.integers(0, len(sealed) - 1))
    match data.draw(st.sampled_from(["cut", "flip", "grow"])):
        case "cut":
            del sealed[index:]
        case "flip":
            sealed[index] ^= 1 << data.draw(st.integers(0, 7))
        case "grow":
            sealed += data.draw(st.binary(min_size=1, max_size=50))
    with pytest.raises(AuthenticationError):
        other.open(header, bytes(sealed))


# --- set-up ------------------------------------------------------------------------------------------------


def damage(data: st.DataObject, message: bytes) -> bytes:
    damaged = bytearray(message)
    index = data.draw(st.integers(0, len(message) - 1))
    if data.draw(st.booleans()):
        del damaged[index:]
    else:
        damaged[index] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(damaged)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_set_up_never_succeeds(data: st.DataObject) -> None:
    """Whichever of the three messages it is: a typed error at the end that reads it, or at the latest the next."""
    which = data.draw(st.sampled_from(["hello", "answer", "finish"]))
    initiator = DeviceHandshake(DEVICE, VERIFY, SERVICE, "bfloat16")
    hello = damage(data, initiator.hello) if which == "hello" else initiator.hello
    try:
        responder = WorkerHandshake(WORKER, VERIFY, SERVICE, hello)
        answer = damage(data, responder.answer) if which == "answer" else responder.answer
        finish, _ = initiator.finish(answer)
        responder.finish(damage(data, finish))
    except (ProtocolError, AuthenticationError):
        if which == "finish":
            # The damage done, the right message still ends the set-up.
            assert responder.finish(finish).peer == DEVICE.certificate
    else:
        pytest.fail(f"a set-up with a damaged {which} succeeded")


@given(st.binary(max_size=400))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_refused_as_a_set_up(message: bytes) -> None:
    with pytest.raises((ProtocolError, AuthenticationError)):
        WorkerHandshake(WORKER, VERIFY, SERVICE, message)
    with pytest.raises((ProtocolError, AuthenticationError)):
        DeviceHandshake(DEVICE, VERIFY, SERVICE, "float32").finish(message)


def test_an_answer_or_finish_of_another_set_up_is_refused() -> None:
    first, second = (DeviceHandshake(DEVICE, VERIFY, SERVICE, "float32") for _ in range(2))
    to_first, to_second = (WorkerHandshake(WORKER, VERIFY, SERVICE, one.hello) for one in (first, second))
    with pytest.raises(AuthenticationError):
        second.finish(to_first.answer)
    finish, _ = first.finish(to_first.answer)
    second.finish(to_second.answer)
    with pytest.raises(AuthenticationError):
        to_second.finish(finish)


def test_nobody_between_can_choose_the_weaker_cipher() -> None:
    initiator = DeviceHandshake(DEVICE, VERIFY, SERVICE, "float32")
    hello = msgspec.msgpack.decode(initiator.hello, type=Hello)
    weaker = msgspec.msgpack.encode(msgspec.structs.replace(hello, suites=[XCHACHA.name]))
    responder = WorkerHandshake(WORKER, VERIFY, SERVICE, weaker)
    with pytest.raises(AuthenticationError):
        initiator.finish(responder.answer)
    answer = msgspec.msgpack.decode(responder.answer, type=Answer)
    for name in ("none", "", AEGIS.name):
        with pytest.raises(AuthenticationError):
            initiator.finish(msgspec.msgpack.encode(msgspec.structs.replace(answer, suite=name)))
    with pytest.raises(AuthenticationError, match="no cipher"):
        WorkerHandshake(
            WORKER, VERIFY, SERVICE, msgspec.msgpack.encode(msgspec.structs.replace(hello, suites=["rot13"]))
        )


def test_an_ephemeral_key_of_small_order_is_refused() -> None:
    for key in (bytes(32), b"\x01" + bytes(31)):
        hello = msgspec.msgpack.encode(Hello(key, [XCHACHA.name], SERVICE, "float32"))
        with pytest.raises(AuthenticationError, match="ephemeral"):
            WorkerHandshake(WORKER, VERIFY, SERVICE, hello)


def test_a_worker_refuses_what_it_does_not_serve() -> None:
    for other in (replace_service(root=b"s" * 32), replace_service(first=3), replace_service(last=27)):
        initiator = DeviceHandshake(DEVICE, VERIFY, other, "float32")
        with pytest.raises(AuthenticationError, match="does not serve"):
            WorkerHandshake(WORKER, VERIFY, SERVICE, initiator.hello)


def replace_service(**changes: object) -> headers.Service:
    return msgspec.structs.replace(SERVICE, **changes)


STRANGER = SigningKey(b"\x01" * 32)
ELSEWHERE = (ModelScope(b"s" * 32, 0, 99),)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"operator": STRANGER}, "operator"),
        ({"not_before": NOW - 50, "not_after": NOW - 10}, "expired"),
        ({"not_before": NOW + 1000}, "not valid before"),
        ({"models": ELSEWHERE}, "does not cover"),
    ],
)
@pytest.mark.parametrize("role", ["device", "worker"])
def test_wrong_certificates_are_refused_on_both_sides(role: Role, wrong: dict[str, object], words: str) -> None:
    bad = issue(role, f"{role}-1", **wrong)  # type: ignore[arg-type]
    pair = {"device": DEVICE, "worker": WORKER, role: bad}
    with pytest.raises(CertificateError, match=words):
        shake_hands(pair["device"], pair["worker"], Verify(roster(*pair.values())))


@pytest.mark.parametrize("role", ["device", "worker"])
def test_the_roster_decides_who_is_a_member(role: Role) -> None:
    name = f"{role}-1"
    with pytest.raises(CertificateError, match="revoked"):
        shake_hands(verify=Verify(roster(DEVICE, WORKER, revoked=name)))
    lone = [one for one in (DEVICE, WORKER) if one.certificate.role != role]
    with pytest.raises(CertificateError, match="not in the roster"):
        shake_hands(verify=Verify(roster(*lone)))


def test_a_device_cannot_pass_for_a_worker_nor_use_anothers_certificate() -> None:
    other = issue("device", "device-2")
    verify = Verify(roster(DEVICE, WORKER, other))
    with pytest.raises(CertificateError, match="not a worker"):
        shake_hands(DEVICE, other, verify)
    thief = replace(other, certificate_bytes=DEVICE.certificate_bytes, certificate=DEVICE.certificate)
    with pytest.raises(AuthenticationError, match="did not sign"):
        shake_hands(thief, WORKER, verify)
    with pytest.raises(AuthenticationError, match="did not sign"):
        shake_hands(DEVICE, replace(WORKER, signing_key=other.signing_key), verify)


def test_a_certificate_of_the_largest_size_fits_into_the_set_up() -> None:
    many = (
        *(ModelScope(bytes((i % 256, i // 256)) * 16, 0, 5) for i in range(900)),
        ModelScope(SERVICE.root, 0, 99),
    )
    worker = issue("worker", "worker-1", models=many)
    assert len(worker.certificate_bytes) > 40_000
    of_device, _ = shake_hands(worker=worker, verify=Verify(roster(DEVICE, worker)))
    assert of_device.peer.name == "worker-1"


def test_a_message_too_large_for_the_set_up_is_refused() -> None:
    with pytest.raises(Malformed, match="large"):
        WorkerHandshake(WORKER, VERIFY, SERVICE, bytes(handshake.MAX_HANDSHAKE + 1))


def test_trust_ends_with_the_roster_or_the_certificate() -> None:
    of_device, _ = shake_hands()
    assert of_device.trusted(roster(DEVICE, WORKER))
    assert not of_device.trusted(roster(DEVICE, WORKER, revoked="worker-1"))
    assert not of_device.trusted(roster(DEVICE))
    of_device.peer = msgspec.structs.replace(of_device.peer, not_after=NOW - 1)
    assert not of_device.trusted(roster(DEVICE, WORKER))
