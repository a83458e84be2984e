"""Key files, certificates, rosters and fleets: what is accepted, and above all what is not."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey, VerifyKey

from split_common.errors import CertificateError, ConfigError, KeysError
from split_common.system import files
from split_common.transport import check_address
from split_common.transport.zmq_socket import curve_z85
from split_common.trust.fleet import Fleet, load_fleet
from split_common.trust.keys import (
    MAX_SIGNED,
    Certificate,
    Identity,
    Member,
    ModelScope,
    Roster,
    open_signed,
    seal,
    verify_certificate,
)
from split_common.trust.passphrase import MAGIC, is_sealed, open_secret, seal_secret
from wiretap import LATE

OPERATOR = SigningKey(bytes(32))
OPERATOR_KEY = bytes(OPERATOR.verify_key)
ROOT = b"r" * 32
START, END = 1_000_000, 2_000_000


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "CACHE", "STATE", "RUNTIME"):
        monkeypatch.setenv(f"LAMBDA_SPLIT_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("LAMBDA_SPLIT_KEYS", raising=False)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet.create(tmp_path / "fleet")


def certify(sign_key: bytes, curve_key: bytes, **changes: object) -> Certificate:
    return msgspec.structs.replace(
        Certificate("worker", "w", sign_key, curve_key, START, END, (ModelScope(ROOT, 2, 8),)), **changes
    )


IDENTITY = Identity.issue(OPERATOR, certify)
SEALED = IDENTITY.certificate_bytes
MEMBER = Member("w", "worker", IDENTITY.certificate.sign_key, IDENTITY.certificate.curve_key)
ROSTER = Roster(3, START, (MEMBER,))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def verify(data: bytes = SEALED, **changes: object) -> Certificate:
    arguments = {"operator_key": OPERATOR_KEY, "roster": ROSTER, "role": "worker", "now": START + 1}
    return verify_certificate(data, **(arguments | changes))  # type: ignore[arg-type]


# --- a passphrase ------------------------------------------------------------------------------------------


def test_a_passphrase_seals_and_opens() -> None:
    sealed = seal_secret(b"secret", "correct horse", 1, 8192)
    assert is_sealed(sealed)
    assert b"secret" not in sealed
    assert sealed != seal_secret(b"secret", "correct horse", 1, 8192)
    assert open_secret(sealed, "correct horse") == b"secret"
    with pytest.raises(KeysError, match="the passphrase is wrong"):
        open_secret(sealed, "correct horsf")
    with pytest.raises(KeysError, match="empty"):
        seal_secret(b"secret", "")
    for length in range(len(sealed)):
        with pytest.raises(KeysError):
            open_secret(sealed[:length], "correct horse")
    for place in range(len(MAGIC), len(sealed)):
        with pytest.raises(KeysError):
            open_secret(sealed[:place] + bytes([sealed[place] ^ 0x80]) + sealed[place + 1 :], "correct horse")


def test_an_operators_key_under_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_PASSPHRASE", "correct horse")
    Fleet.create(tmp_path / "keys")
    key = tmp_path / "keys" / "operator.key"
    files.write_private(key, seal_secret(key.read_bytes(), "correct horse", 1, 8192))
    fleet = Fleet.open(tmp_path / "keys")
    assert fleet.identity("worker")  # needs no passphrase
    fleet.add_member("device", "phone")
    monkeypatch.setenv("LAMBDA_SPLIT_PASSPHRASE", "wrong")
    fleet.revoke("phone")  # It was asked for already.
    with pytest.raises(KeysError, match=r"operator\.key: the passphrase is wrong"):
        Fleet.open(tmp_path / "keys").revoke("device-1")
    monkeypatch.delenv("LAMBDA_SPLIT_PASSPHRASE")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(KeysError, match="it needs a passphrase: set LAMBDA_SPLIT_PASSPHRASE"):
        Fleet.open(tmp_path / "keys").require_operator()


# --- files -------------------------------------------------------------------------------------------------


def test_private_file_is_private_with_its_new_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    files.write_private(path, b"one")
    files.write_private(path, b"two")
    assert files.read_private(path) == b"two"
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_public_file_is_readable_whatever_the_umask(tmp_path: Path) -> None:
    files.write_public(tmp_path / "public", b"x")
    assert mode(tmp_path / "public") == 0o644


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    files.write_private(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(KeysError, match="secret cannot be written: No space"):
        files.write_private(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("secret", b"old")]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601])
def test_file_open_to_others_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "secret"
    files.write_private(path, b"x")
    path.chmod(bits)
    with pytest.raises(KeysError, match="chmod 600"):
        files.read_private(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_strangers_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    files.write_private(path, b"x")
    os.chown(path, 12345, -1)
    with pytest.raises(KeysError, match=f"secret belongs to another user; run: chown {os.geteuid()}"):
        files.read_private(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_private_dir_refuses_a_strangers_link(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert files.private_dir(tmp_path / "link").samefile(tmp_path / "mine")
    os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    with pytest.raises(KeysError, match="belongs to another user"):
        files.private_dir(tmp_path / "link")


def test_private_dir_refuses_a_place_where_all_may_exchange_it(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    files.private_dir(tmp_path / "open" / "mine")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(KeysError, match="open can be written by other users; run: chmod o-w"):
        files.private_dir(tmp_path / "open" / "mine")


@pytest.mark.parametrize("place", ["file", "/dev/null"])
def test_private_dir_refuses_what_is_not_a_directory(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KeysError, match="is not a directory"):
        files.private_dir(tmp_path / place)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="keys init"):
        files.read_private(tmp_path / "none")
    with pytest.raises(KeysError, match="Is a directory"):
        files.read_private(tmp_path)


def test_private_dir_refuses_one_that_others_may_write_to(tmp_path: Path) -> None:
    assert mode(files.private_dir(tmp_path / "new")) == 0o700
    (tmp_path / "new").chmod(0o770)
    with pytest.raises(KeysError, match="chmod 700"):
        files.private_dir(tmp_path / "new")


def test_private_dir_refuses_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = tmp_path.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: me + 1)
    with pytest.raises(KeysError, match="another user"):
        files.private_dir(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_private_dir_refuses_a_strangers_parent(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    files.private_dir(tmp_path / "theirs" / "mine")
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(KeysError, match="another user"):
        files.private_dir(tmp_path / "theirs" / "mine")


def test_directories_have_defaults_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (
        ("CONFIG", files.config_dir),
        ("CACHE", files.cache_dir),
        ("STATE", files.state_dir),
        ("RUNTIME", files.runtime_dir),
    ):
        assert function() == tmp_path / name.lower()
        monkeypatch.delenv(f"LAMBDA_SPLIT_{name}")
        assert function().name == "lambda-split"


# --- signed formats ----------------------------------------------------------------------------------------


def test_sealed_structs_open_again() -> None:
    assert open_signed("certificate", Certificate, SEALED, OPERATOR_KEY) == IDENTITY.certificate
    assert open_signed("roster", Roster, seal("roster", ROSTER, OPERATOR), OPERATOR_KEY) == ROSTER


def test_signature_is_ed25519_of_the_documented_message() -> None:
    payload, signature = msgspec.msgpack.decode(SEALED)
    VerifyKey(OPERATOR_KEY).verify(b"lambda-split certificate\0" + payload, signature)


@pytest.mark.parametrize("data", [SEALED, seal("roster", ROSTER, OPERATOR)], ids=["certificate", "roster"])
def test_every_flipped_bit_is_noticed(data: bytes) -> None:
    kind, type_ = ("certificate", Certificate) if data is SEALED else ("roster", Roster)
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(CertificateError):
                open_signed(kind, type_, bytes(damaged), OPERATOR_KEY)  # type: ignore[arg-type]


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CertificateError):
        open_signed("certificate", Certificate, data, OPERATOR_KEY)
    with pytest.raises(KeysError):
        Identity.decode(data)


@given(st.data())
@settings(max_examples=200)
def test_cut_grown_and_overwritten_certificates_are_refused(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(SEALED)))
    end = data.draw(st.integers(start, len(SEALED)))
    changed = SEALED[:start] + data.draw(st.binary(max_size=80)) + SEALED[end:]
    if changed != SEALED:
        with pytest.raises(CertificateError):
            verify(changed)


def test_kinds_are_not_interchangeable() -> None:
    with pytest.raises(CertificateError, match="not signed"):
        open_signed("roster", Certificate, SEALED, OPERATOR_KEY)


def test_size_is_bounded_before_anything_is_parsed() -> None:
    with pytest.raises(CertificateError, match="at most"):
        open_signed("certificate", Certificate, bytes(MAX_SIGNED["certificate"] + 1), OPERATOR_KEY)
    scopes = tuple(ModelScope(ROOT, i, i + 1) for i in range(2000))
    with pytest.raises(KeysError, match="at most"):
        Identity.issue(OPERATOR, lambda s, c: certify(s, c, models=scopes))


K, L = b"k" * 32, b"l" * 32


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "A"},
        {"name": "a\n"},
        {"name": "../a"},
        {"name": ".a"},
        {"name": "a" * 65},
        {"name": "operator"},
        {"sign_key": K[:31]},
        {"curve_key": K + b"k"},
        {"role": "operator"},
        {"not_before": -1},
        {"not_after": START},
        {"version": 2},
        {"models": [{"root": ROOT, "first": 3, "last": 3}]},
        {"models": [{"root": ROOT, "first": -1, "last": 3}]},
        {"models": [{"root": ROOT[1:], "first": 1, "last": 3}]},
        {"extra": 1},
    ],
    ids=str,
)
def test_properly_signed_nonsense_is_refused(fields: dict[str, object]) -> None:
    """Even the operator cannot make a half-valid object."""
    good = msgspec.to_builtins(IDENTITY.certificate, builtin_types=(bytes,))
    for content, sound in ((good, True), (good | fields, False)):
        payload = msgspec.msgpack.encode(content)
        signature = OPERATOR.sign(b"lambda-split certificate\0" + payload).signature
        data = msgspec.msgpack.encode([payload, signature])
        if sound:
            assert open_signed("certificate", Certificate, data, OPERATOR_KEY) == IDENTITY.certificate
        else:
            with pytest.raises(CertificateError, match="damaged"):
                open_signed("certificate", Certificate, data, OPERATOR_KEY)


@pytest.mark.parametrize("name", ["a", "worker-1", "0.x_y-z", "operator-2", "a" * 64])
def test_allowed_names(name: str) -> None:
    assert Identity.issue(OPERATOR, lambda s, c: certify(s, c, name=name)).certificate.name == name


@pytest.mark.parametrize(
    "other",
    [
        Member("w", "device", K, L),
        Member("v", "worker", MEMBER.sign_key, L),
        Member("v", "worker", K, MEMBER.curve_key),
    ],
)
def test_roster_members_differ_in_name_and_keys(other: Member) -> None:
    with pytest.raises(ValueError, match="share"):
        Roster(1, 0, (MEMBER, other))


def test_roster_lookups() -> None:
    other = Member("d", "device", K, L, revoked=True)
    roster = Roster(1, 0, (MEMBER, other))
    assert roster.by_name("d") is roster.by_sign_key(K) is roster.by_curve_key(L) is other
    assert roster.by_name("x") is roster.by_sign_key(L) is roster.by_curve_key(K) is None
    assert other.fingerprint != MEMBER.fingerprint
    assert len(other.fingerprint) == 32


# --- certificates ------------------------------------------------------------------------------------------


def test_good_certificate_passes() -> None:
    assert verify(scope=ModelScope(ROOT, 2, 8)) == IDENTITY.certificate
    assert verify(roster=None) == IDENTITY.certificate
    assert verify(now=START).name == verify(now=END - 1).name == "w"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator_key": bytes(SigningKey(K).verify_key)}, "not signed by this fleet's operator"),
        ({"role": "device"}, "worker 'w' is not a device"),
        ({"now": START - 1}, "'w' is not valid before 1970-01-12 13:46 UTC"),
        ({"now": END}, "'w' expired on 1970-01-24 03:33 UTC"),
        ({"now": None}, "'w' expired on"),
        ({"roster": Roster(9, 0, ())}, r"'w' is not in the roster \(version 9\)"),
        ({"roster": Roster(9, 0, (Member("w", "worker", K, MEMBER.curve_key),))}, "'w' differ"),
        ({"roster": Roster(9, 0, (Member("w", "worker", MEMBER.sign_key, K),))}, "'w' differ"),
        ({"roster": Roster(9, 0, (msgspec.structs.replace(MEMBER, role="device"),))}, "'w' differ"),
        ({"roster": Roster(9, 0, (msgspec.structs.replace(MEMBER, revoked=True),))}, "'w' is revoked"),
        ({"scope": ModelScope(ROOT, 1, 8)}, "'w' does not cover layers 1:8"),
        ({"scope": ModelScope(ROOT, 2, 9)}, "'w' does not cover layers 2:9"),
        ({"scope": ModelScope(K, 2, 8)}, "'w' does not cover"),
    ],
)
def test_refused_certificates(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        verify(**changes)


def test_no_models_means_any_model() -> None:
    identity = Identity.issue(OPERATOR, lambda s, c: certify(s, c, models=()))
    assert verify(identity.certificate_bytes, roster=None, scope=ModelScope(K, 0, 99))


# --- identities --------------------------------------------------------------------------------------------


def test_identity_survives_its_file_and_hides_its_secrets() -> None:
    again = Identity.decode(IDENTITY.encode())
    assert again == IDENTITY
    assert repr(again) == str(again) == "Identity(worker 'w')"
    VerifyKey(MEMBER.sign_key).verify(b"message", again.sign(b"message"))


def test_identity_of_mixed_keys_is_refused() -> None:
    other = Identity.issue(OPERATOR, certify)
    for field in ("signing_key", "curve_secret", "certificate_bytes"):
        arguments = {**vars(IDENTITY), field: getattr(other, field)}
        with pytest.raises(KeysError, match="secrets are not those"):
            Identity.decode(Identity(**arguments).encode())


def test_identity_error_shows_no_secret() -> None:
    with pytest.raises(KeysError) as caught:
        Identity.decode(IDENTITY.encode()[:-1])
    assert caught.value.__suppress_context__
    assert str(caught.value) == "the key file is damaged"


def test_curve_keys_work_in_zeromq() -> None:
    import zmq

    public, secret = curve_z85(IDENTITY)
    assert zmq.curve_public(secret) == public


# --- fleets ------------------------------------------------------------------------------------------------


def test_new_fleet(fleet: Fleet) -> None:
    assert mode(fleet.path) == 0o700
    for name in ("operator.key", "broker.key", "device-1.key", "worker-1.key"):
        assert mode(fleet.path / name) == 0o600
    for name in ("operator.pub", "roster"):
        assert mode(fleet.path / name) == 0o644
    assert [(m.role, m.name, m.revoked) for m in fleet.roster().members] == [
        ("broker", "broker", False),
        ("device", "device-1", False),
        ("worker", "worker-1", False),
    ]
    for role in ("broker", "device", "worker"):
        data = fleet.identity(role).certificate_bytes
        found = verify_certificate(data, operator_key=fleet.operator_key, roster=fleet.roster(), role=role)
        assert 364 < (found.not_after - time.time()) / 86400 <= 365
    assert not fleet.is_loopback


def test_fleet_opens_again_and_is_not_overwritten(fleet: Fleet) -> None:
    again = Fleet.open(fleet.path)
    assert again.roster() == fleet.roster()
    assert again.roster_bytes() == fleet.roster_bytes() == (fleet.path / "roster").read_bytes()
    with pytest.raises(KeysError, match="already holds a fleet"):
        Fleet.create(fleet.path)
    assert Fleet.open(fleet.path).roster_bytes() == fleet.roster_bytes()


def test_opening_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="keys init"):
        Fleet.open(tmp_path / "none")


@pytest.mark.parametrize("name", ["operator.pub", "roster", "worker-1.key", "operator.key"])
def test_damaged_file_is_named(fleet: Fleet, name: str) -> None:
    path = fleet.path / name
    path.write_bytes(path.read_bytes()[:-1])

    def use() -> None:
        opened = Fleet.open(fleet.path)
        opened.identity("worker")
        opened.add_member("worker", "w")

    with pytest.raises(KeysError, match=name):
        use()


def test_member_of_another_fleet_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    other = Fleet.create(tmp_path / "other")
    files.write_private(fleet.path / "worker-1.key", (other.path / "worker-1.key").read_bytes())
    with pytest.raises(KeysError, match="another fleet"):
        fleet.identity("worker")


def test_identity_is_chosen_by_role_and_name(fleet: Fleet) -> None:
    fleet.add_member("worker", "w2", [ModelScope(ROOT, 0, 4)])
    with pytest.raises(KeysError, match="choose one of: w2, worker-1"):
        fleet.identity("worker")
    assert fleet.identity("worker", "w2").certificate.models == (ModelScope(ROOT, 0, 4),)
    with pytest.raises(KeysError, match="'w2' is a worker, not a device"):
        fleet.identity("device", "w2")
    with pytest.raises(KeysError, match=r"w3\.key is missing"):
        fleet.identity("worker", "w3")
    fleet.revoke("worker-1")
    assert fleet.identity("worker").certificate.name == "w2"
    with pytest.raises(KeysError, match="revoked"):
        fleet.identity("worker", "worker-1")
    (fleet.path / "device-1.key").unlink()
    with pytest.raises(KeysError, match="no key of a device"):
        fleet.identity("device")


@pytest.mark.parametrize("name", ["worker-1", "Upper", "a/b", "operator", ""])
def test_refused_names_change_nothing(fleet: Fleet, name: str) -> None:
    before = {path: path.read_bytes() for path in fleet.path.iterdir()}
    with pytest.raises(KeysError, match=r"not a name for a member|never used twice"):
        fleet.add_member("worker", name)
    assert {path: path.read_bytes() for path in fleet.path.iterdir()} == before


def test_validity_must_be_positive(fleet: Fleet) -> None:
    with pytest.raises(KeysError, match="0 days"):
        fleet.add_member("worker", "w", days=0)


def test_members_machine_cannot_do_the_operators_work(fleet: Fleet) -> None:
    (fleet.path / "operator.key").unlink()
    assert fleet.identity("device")
    for work in (lambda: fleet.add_member("worker", "w"), lambda: fleet.revoke("worker-1")):
        with pytest.raises(KeysError, match="operator's machine"):
            work()


def test_operators_key_must_be_its_own(fleet: Fleet) -> None:
    files.write_private(fleet.path / "operator.key", K)
    with pytest.raises(KeysError, match=r"operator\.pub"):
        fleet.revoke("worker-1")


def test_revocation_reaches_a_running_process(fleet: Fleet) -> None:
    running = Fleet.open(fleet.path)
    assert not running.refresh()
    version = running.roster().version
    assert fleet.revoke("worker-1").version == version + 1
    assert running.refresh()
    assert not running.refresh()
    member = running.roster().by_name("worker-1")
    assert member is not None
    assert member.revoked
    assert fleet.revoke("worker-1").version == version + 1
    with pytest.raises(KeysError, match="no member"):
        fleet.revoke("nobody")


def test_refresh_never_rolls_back_and_survives_damage(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    old = fleet.roster_bytes()
    fleet.add_member("worker", "w2")
    newest = fleet.roster_bytes()
    path = fleet.path / "roster"
    for bad in (old, newest[:-1], b"", b"\0" * 500, None):
        caplog.clear()
        path.unlink() if bad is None else path.write_bytes(bad)
        with caplog.at_level(logging.WARNING):
            assert not fleet.refresh()
            assert not fleet.refresh()
        assert len(caplog.records) == 1
        assert fleet.roster_bytes() == newest


def rosters(fleet: Fleet) -> Callable[[int], bytes]:
    """Signs rosters of any version in the operator's name."""
    operator = SigningKey((fleet.path / "operator.key").read_bytes())
    return lambda version: seal("roster", Roster(version, 0, fleet.roster().members), operator)


def test_accepted_roster_is_newer_and_kept(fleet: Fleet) -> None:
    make = rosters(fleet)
    assert fleet.accept_roster(fleet.roster_bytes()).version == 1
    assert fleet.accept_roster(make(5)).version == 5
    assert (fleet.path / "roster").read_bytes() == make(5)
    assert Fleet.open(fleet.path).roster().version == 5
    with pytest.raises(CertificateError, match="older"):
        fleet.accept_roster(make(4))
    with pytest.raises(CertificateError, match="not signed"):
        fleet.accept_roster(seal("roster", Roster(9, 0, ()), OPERATOR))
    contradicting = SigningKey((fleet.path / "operator.key").read_bytes())
    with pytest.raises(CertificateError, match="contradict"):
        fleet.accept_roster(seal("roster", Roster(5, 1, ()), contradicting))
    assert fleet.roster_bytes() == make(5)


def test_accepted_roster_does_not_undo_a_newer_one_on_disk(fleet: Fleet) -> None:
    make = rosters(fleet)
    files.write_public(fleet.path / "roster", make(7))
    with pytest.raises(CertificateError, match="older"):
        fleet.accept_roster(make(6))
    assert fleet.roster_bytes() == (fleet.path / "roster").read_bytes() == make(7)


def test_accepted_roster_waits_for_nobody_and_is_kept_when_it_can_be(fleet: Fleet) -> None:
    """The link's thread accepts it, whose heartbeats must go on while another process holds the directory."""
    make = rosters(fleet)
    with Fleet.open(fleet.path).locked():
        assert fleet.accept_roster(make(5)).version == 5
        assert Fleet.open(fleet.path).roster().version == 1
    deadline = time.monotonic() + LATE
    while Fleet.open(fleet.path).roster().version != 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("what", ["filelock.FileLock.acquire", "tempfile.mkstemp"])
def test_accepted_roster_is_in_force_where_nothing_can_be_written(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    make = rosters(fleet)
    monkeypatch.setattr(what, denied)
    assert fleet.accept_roster(make(5)).version == 5
    assert not fleet.refresh()
    assert fleet.roster_bytes() == make(5)
    with pytest.raises(KeysError, match="cannot be written"):
        fleet.add_member("worker", "w")
    assert Fleet.open(fleet.path).roster().version == 1


def _add_members(path: Path, prefix: str) -> None:
    fleet = Fleet.open(path)
    for number in range(8):
        fleet.add_member("device", f"{prefix}{number}")


def _loopback_key(_: int) -> bytes:
    return Fleet.loopback().operator_key


def test_two_processes_lose_no_member(fleet: Fleet) -> None:
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_add_members, args=(fleet.path, prefix)) for prefix in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert fleet.refresh()
    assert fleet.roster().version == 17
    assert {f"{p}{n}" for p in "ab" for n in range(8)} < {member.name for member in fleet.roster().members}


# --- the loopback fleet ------------------------------------------------------------------------------------


def test_processes_share_one_loopback_fleet() -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        operators = set(pool.map(_loopback_key, range(8), chunksize=1))
    assert operators == {Fleet.loopback().operator_key}
    path = Fleet.loopback().path
    assert mode(path) == 0o700
    assert sorted(entry.name for entry in path.parent.iterdir()) in (
        ["loopback"],
        ["loopback", "loopback.lock"],
    )


def test_loopback_fleet_renews_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Fleet.loopback()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 364 * 86400)
    assert Fleet.loopback().operator_key == first.operator_key
    monkeypatch.setattr(time, "time", lambda: now + 366 * 86400)
    renewed = Fleet.loopback()
    assert renewed.operator_key != first.operator_key
    assert renewed.identity("device").certificate.not_after > now + 366 * 86400
    (renewed.path / "roster").unlink()
    assert Fleet.loopback().operator_key != renewed.operator_key
    assert not [entry for entry in first.path.parent.iterdir() if not entry.name.startswith("loopback")]


def test_loopback_in_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime").chmod(0o777)
    with pytest.raises(KeysError, match="chmod 700"):
        Fleet.loopback()


def test_load_fleet_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_fleet().is_loopback
    configured = Fleet.create(tmp_path / "config" / "keys")
    assert load_fleet().path == configured.path
    by_env = Fleet.create(tmp_path / "env")
    monkeypatch.setenv("LAMBDA_SPLIT_KEYS", str(by_env.path))
    assert load_fleet().path == by_env.path
    assert load_fleet(configured.path).path == configured.path
    monkeypatch.setenv("LAMBDA_SPLIT_KEYS", str(tmp_path / "none"))
    with pytest.raises(KeysError, match="keys init"):
        load_fleet()


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:*", True),
        ("tcp://[::1]:5555", True),
        ("tcp://localhost:5555", True),
        ("ipc:///run/x", True),
        ("tcp://*:5555", False),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://[::1:5555", False),
        ("tcp://192.168.1.2:5555", False),
        ("tcp://localhost.example.com:5555", False),
        ("tcp://127.0.0.1.example.com:5555", False),
        ("tcp://127.0.0.1:0;10.0.0.1:5555", False),
        ("redis://cache:6379", False),
        ("127.0.0.1:5555", False),
        ("", False),
    ],
)
def test_loopback_keys_stay_on_the_machine(address: str, local: bool, fleet: Fleet) -> None:
    check_address(address, fleet)
    loopback = Fleet(fleet.path, fleet.operator_key, is_loopback=True)
    if local:
        check_address(address, loopback)
    else:
        with pytest.raises(ConfigError, match="keys init"):
            check_address(address, loopback)


def test_keys_need_no_torch() -> None:
    code = "import sys, split_common.cli.keys as _; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
