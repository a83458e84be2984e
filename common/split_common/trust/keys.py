"""Certificates, rosters and identities: their formats, their signatures and their rules.

A fleet's root of trust is one operator key (Ed25519, RFC 8032). It signs a certificate for each member, and a
roster of all members. Nothing here touches a file or a socket.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey
from nacl.signing import SigningKey, VerifyKey

from split_common.errors import CertificateError, KeysError

Role = Literal["broker", "device", "worker"]
SignedKind = Literal["certificate", "roster", "manifest"]

#: A key or a SHA-256 digest: 32 bytes.
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
#: A member's name: 1 to 64 characters, safe in a file name; not `operator`, whose file `operator.key` is.
Name = Annotated[str, Meta(pattern=r"\A(?!operator\Z)[a-z0-9][a-z0-9._-]{0,63}\Z")]
#: Rule for names, for messages.
NAME_RULE = (
    "up to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, and neither 'operator' nor 'default'"
)
#: Names that no new member gets: the operator's, and that of the user that Redis gives to everybody.
RESERVED_NAMES: Final = ("operator", "default")
#: Seconds since 1970.
Seconds = Annotated[int, Meta(ge=0)]

#: The largest signed file of each kind that is read, in bytes.
MAX_SIGNED: Final[dict[SignedKind, int]] = {"certificate": 64 << 10, "roster": 16 << 20, "manifest": 64 << 20}

#: Seconds before it was made from which a certificate is valid: clocks differ.
CLOCK_LEEWAY: Final = 3600

_DAY: Final = 86_400

_Sealed = TypeVar("_Sealed", bound=Struct)


class ModelScope(Struct, frozen=True, forbid_unknown_fields=True):
    """Body layers `[first, last)` of the model whose manifest has this root."""

    root: Bytes32
    first: Annotated[int, Meta(ge=0)]
    last: int

    def __post_init__(self) -> None:
        if self.first >= self.last:
            raise ValueError(f"no layers in {self.first}:{self.last}")

    def covers(self, other: ModelScope) -> bool:
        """Whether `other` names layers of the same model that are all in this scope."""
        return self.root == other.root and self.first <= other.first and other.last <= self.last


class Certificate(Struct, frozen=True, forbid_unknown_fields=True):
    """The operator's statement about a member: its role, its public keys, and how long they are valid."""

    role: Role
    name: Name
    #: Ed25519 and X25519 public keys.
    sign_key: Bytes32
    curve_key: Bytes32
    not_before: Seconds
    not_after: Seconds
    #: Empty for any model of the fleet.
    models: tuple[ModelScope, ...] = ()
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.not_before >= self.not_after:
            raise ValueError("the validity ends before it begins")


class Member(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the roster."""

    name: Name
    role: Role
    sign_key: Bytes32
    curve_key: Bytes32
    revoked: bool = False

    @property
    def fingerprint(self) -> str:
        """32 hex digits (128 bits) of the SHA-256 of both public keys, for people to compare."""
        return hashlib.sha256(self.sign_key + self.curve_key).hexdigest()[:32]


class Roster(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """All members of a fleet, including revoked ones. A higher version replaces a lower one."""

    version: Annotated[int, Meta(ge=1)]
    issued: Seconds
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if not len(self.members) == len(self._names) == len(self._sign_keys) == len(self._curve_keys):
            raise ValueError("two members share a name or a key")

    def by_name(self, name: str) -> Member | None:
        """The member of this name, revoked or not."""
        return self._names.get(name)

    def by_sign_key(self, key: bytes) -> Member | None:
        """The member of this Ed25519 public key (32 bytes), revoked or not."""
        return self._sign_keys.get(key)

    def by_curve_key(self, key: bytes) -> Member | None:
        """The member of this X25519 public key (32 bytes), revoked or not."""
        return self._curve_keys.get(key)

    @cached_property
    def _names(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    @cached_property
    def _sign_keys(self) -> dict[bytes, Member]:
        return {member.sign_key: member for member in self.members}

    @cached_property
    def _curve_keys(self) -> dict[bytes, Member]:
        return {member.curve_key: member for member in self.members}


class Signed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """MessagePack of a struct, and the operator's Ed25519 signature of `_signed_message`."""

    payload: bytes
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


def seal(kind: SignedKind, value: Struct, operator: SigningKey) -> bytes:
    """Encodes and signs a value.

    Raises:
        KeysError: it breaks a rule of its own type, or is too large.
    """
    payload = msgspec.msgpack.encode(value)
    try:
        msgspec.msgpack.decode(payload, type=type(value))
    except msgspec.ValidationError as error:
        raise KeysError(f"cannot sign this {kind}: {error}") from None
    data = msgspec.msgpack.encode(Signed(payload, operator.sign(_signed_message(kind, payload)).signature))
    if len(data) > MAX_SIGNED[kind]:
        raise KeysError(f"cannot sign this {kind}: {len(data)} bytes, at most {MAX_SIGNED[kind]} are allowed")
    return data


def open_signed(kind: SignedKind, type_: type[_Sealed], data: bytes, operator_key: bytes) -> _Sealed:
    """Verifies and decodes what `seal` made. Only the envelope is parsed before the signature is verified.

    Args:
        kind, type_: what is expected, and its type.
        data: the signed bytes.
        operator_key: the operator's Ed25519 public key (32 bytes).

    Raises:
        CertificateError: the bytes are too large or damaged, of another kind, or not signed by this operator.
    """
    if len(data) > MAX_SIGNED[kind]:
        raise CertificateError(f"{kind} of {len(data)} bytes; at most {MAX_SIGNED[kind]} are allowed")
    signed = _decode(kind, Signed, data)
    try:
        VerifyKey(operator_key).verify(_signed_message(kind, signed.payload), signed.signature)
    except CryptoError:
        raise CertificateError(f"{kind} is not signed by this fleet's operator, or is damaged") from None
    return _decode(kind, type_, signed.payload)


def verify_certificate(
    data: bytes,
    *,
    operator_key: bytes,
    roster: Roster | None,
    role: Role,
    now: float | None = None,
    scope: ModelScope | None = None,
) -> Certificate:
    """Checks a signed certificate and returns it.

    Args:
        data: the certificate as the operator signed it.
        operator_key: the operator's Ed25519 public key (32 bytes).
        roster: None leaves the roster out.
        role: that the certificate must have.
        now: seconds since 1970; None for the current time.
        scope: layers that the certificate must cover; None for any.

    Raises:
        CertificateError: the certificate is damaged or another operator's, has another role, does not agree with
            the roster or is revoked there, is not valid now, or does not cover the scope. The message names the
            member, unless the signature is wrong; so do the error's `member` and `sign_key`.
    """
    certificate = open_signed("certificate", Certificate, data, operator_key)
    try:
        check_certificate(certificate, roster=roster, role=role, now=now, scope=scope)
    except CertificateError as error:
        error.member, error.sign_key = certificate.name, certificate.sign_key
        raise
    return certificate


def check_certificate(
    certificate: Certificate,
    *,
    roster: Roster | None,
    role: Role,
    now: float | None = None,
    scope: ModelScope | None = None,
) -> None:
    """Checks all of a certificate but its signature, which was verified before.

    Args:
        certificate, roster, role, now, scope: as `verify_certificate`.

    Raises:
        CertificateError: as `verify_certificate`.
    """
    who = f"{certificate.role} {certificate.name!r}"
    if certificate.role != role:
        raise CertificateError(f"{who} is not a {role}")
    if roster is not None:
        _check_roster(certificate, roster, who)
    now = time.time() if now is None else now
    if now < certificate.not_before:
        raise CertificateError(f"the certificate of {who} is not valid before {_date(certificate.not_before)}")
    if now >= certificate.not_after:
        raise CertificateError(f"the certificate of {who} expired on {_date(certificate.not_after)}")
    if scope is not None and certificate.models and not any(m.covers(scope) for m in certificate.models):
        raise CertificateError(
            f"the certificate of {who} does not cover layers {scope.first}:{scope.last} "
            f"of model {scope.root.hex()[:16]}"
        )


@dataclass(frozen=True, repr=False)
class Identity:
    """A member's certificate, its secret keys (Ed25519 and X25519), and the operator that it trusts."""

    #: The certificate as the operator signed it, and decoded.
    certificate_bytes: bytes
    certificate: Certificate
    signing_key: SigningKey
    #: X25519 secret key: 32 bytes.
    curve_secret: bytes
    #: The operator's Ed25519 public key: 32 bytes.
    operator_key: bytes

    def __repr__(self) -> str:
        return f"Identity({self.certificate.role} {self.certificate.name!r})"

    @classmethod
    def issue(cls, operator: SigningKey, certify: Callable[[bytes, bytes], Certificate]) -> Identity:
        """Makes new secrets, and signs the certificate that `certify(sign_key, curve_key)` returns for them."""
        signing_key, curve = SigningKey.generate(), PrivateKey.generate()
        certificate = certify(bytes(signing_key.verify_key), bytes(curve.public_key))
        sealed = seal("certificate", certificate, operator)
        return cls(sealed, certificate, signing_key, bytes(curve), bytes(operator.verify_key))

    def encode(self) -> bytes:
        """The bytes of a `.key` file, including the secrets."""
        return msgspec.msgpack.encode(
            (1, self.certificate_bytes, bytes(self.signing_key), self.curve_secret, self.operator_key)
        )

    @classmethod
    def decode(cls, data: bytes) -> Identity:
        """Reads what `encode` made.

        Raises:
            KeysError: it is damaged, or its keys do not belong together.
        """
        try:
            _, sealed, seed, curve_secret, operator_key = msgspec.msgpack.decode(data, type=_IdentityFile)
            certificate = open_signed("certificate", Certificate, sealed, operator_key)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, CertificateError):
            raise KeysError("the key file is damaged") from None
        signing_key = SigningKey(seed)
        curve_key = bytes(PrivateKey(curve_secret).public_key)
        if (certificate.sign_key, certificate.curve_key) != (bytes(signing_key.verify_key), curve_key):
            raise KeysError("the key file is damaged: its secrets are not those of its certificate")
        return cls(sealed, certificate, signing_key, curve_secret, operator_key)

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature (64 bytes) of a message, which must begin with its purpose."""
        return self.signing_key.sign(message).signature


def issue_identity(
    operator: SigningKey, role: Role, name: str, models: tuple[ModelScope, ...], days: float
) -> Identity:
    """New secrets and a certificate for a member.

    Args:
        operator: signs the certificate.
        role, name, models: what the certificate says.
        days: how long it is valid.

    Raises:
        KeysError: `days` is not positive.
    """
    if days <= 0:
        raise KeysError(f"a certificate cannot last {days} days")
    now = int(time.time())
    begin, end = now - CLOCK_LEEWAY, now + int(days * _DAY)
    return Identity.issue(
        operator, lambda sign_key, curve_key: Certificate(role, name, sign_key, curve_key, begin, end, models)
    )


#: Format version, signed certificate, Ed25519 seed, X25519 secret key, operator's public key.
_IdentityFile = tuple[Literal[1], bytes, Bytes32, Bytes32, Bytes32]


def _decode(kind: SignedKind, type_: type[_Sealed], data: bytes) -> _Sealed:
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CertificateError(f"{kind} is damaged: {error}") from None


def _signed_message(kind: SignedKind, payload: bytes) -> bytes:
    """The bytes that are signed. They begin with the kind, so a signed roster cannot pass for a certificate."""
    return b"lambda-split " + kind.encode() + b"\0" + payload


def _check_roster(certificate: Certificate, roster: Roster, who: str) -> None:
    member = roster.by_name(certificate.name)
    if member is None:
        raise CertificateError(f"{who} is not in the roster (version {roster.version})")
    if member.revoked:
        raise CertificateError(f"{who} is revoked")
    listed = (member.role, member.sign_key, member.curve_key)
    if listed != (certificate.role, certificate.sign_key, certificate.curve_key):
        raise CertificateError(f"the role or keys of {who} differ from the roster's")


def _date(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M UTC}"
    except (OverflowError, ValueError):
        return f"second {seconds}"
