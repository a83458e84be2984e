"""End-to-end encryption between one device and one worker.

A channel is set up in three messages, in the SIGMA-I pattern (Krawczyk, "SIGMA: the SIGn-and-MAc Approach to
Authenticated Diffie-Hellman", 2003) over libsodium's `crypto_kx`:

1. `Hello`, device to any worker: an ephemeral X25519 key, the ciphers it offers, the service it asks for.
2. `Answer`, worker to device: its ephemeral key and the cipher; sealed: its certificate and its signature of the
   transcript.
3. `Finish`, device to worker: sealed: its certificate and its signature of the transcript.

The worker confirms the third under the channel's own keys (those of session 0), so that each of them may be lost
and sent again. Neither side spends memory on a session before that.

Ephemeral keys are forgotten after set-up, so that a key stolen later opens nothing recorded earlier. Each session
and epoch has keys of its own, derived from the channel's; every body has a fresh nonce, its header's counter.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec
import nacl.bindings as sodium
import nacl.exceptions
from nacl.encoding import RawEncoder
from nacl.hash import blake2b

from split_common.errors import AuthenticationError, Malformed
from split_common.headers import Hash, Relay, Service
from split_common.keys import Certificate, Identity, Role, Roster
from split_common.payloads import Dtype

#: After this many seconds a device sets up a new channel for new sessions.
CHANNEL_LIFETIME = 3600.0

#: Sessions that may be opened over one channel; after that a device sets up a new one.
CHANNEL_SESSIONS = 65536

#: Largest handshake message, in bytes: a certificate of the largest size fits.
MAX_HANDSHAKE = 80 * 1024

_T = TypeVar("_T")

#: Checks a peer's signed certificate and returns it; raises CertificateError.
Verify = Callable[[bytes, Role], Certificate]


@dataclass(frozen=True)
class Suite:
    """An AEAD of libsodium. Sizes in bytes."""

    name: str
    key_size: int
    nonce_size: int
    tag_size: int
    encrypt: Callable[[bytes, bytes | None, bytes, bytes], bytes]
    decrypt: Callable[[bytes, bytes | None, bytes, bytes], bytes]


AEGIS = Suite("aegis128l", 16, 16, 32, sodium.crypto_aead_aegis128l_encrypt, sodium.crypto_aead_aegis128l_decrypt)
XCHACHA = Suite(
    "xchacha20poly1305",
    32,
    24,
    16,
    sodium.crypto_aead_xchacha20poly1305_ietf_encrypt,
    sodium.crypto_aead_xchacha20poly1305_ietf_decrypt,
)
SUITES = {suite.name: suite for suite in (AEGIS, XCHACHA)}


def preferred_suites() -> list[str]:
    """Names of the suites of this machine, the fastest first: AEGIS only where the CPU has AES."""
    try:
        sodium.crypto_aead_aes256gcm_encrypt(b"", b"", bytes(12), bytes(32))
    except Exception:
        return [XCHACHA.name]
    return [AEGIS.name, XCHACHA.name]


class Hello(msgspec.Struct, array_like=True, frozen=True):
    ephemeral: Hash
    suites: Annotated[list[str], msgspec.Meta(min_length=1, max_length=8)]
    service: Service
    dtype: Dtype


class Answer(msgspec.Struct, array_like=True, frozen=True):
    ephemeral: Hash
    suite: str
    credentials: bytes


class Credentials(msgspec.Struct, array_like=True, frozen=True):
    """A signed certificate, and the signature of the transcript by the key that it names."""

    certificate: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Box:
    """One direction of encryption: an AEAD under one key; the nonce is a counter that the caller never repeats."""

    def __init__(self, suite: Suite, key: bytes) -> None:
        self.suite = suite
        self._key = key[: suite.key_size]

    def seal(self, counter: int, data: bytes, plaintext: bytes) -> bytes:
        return self.suite.encrypt(plaintext, data, self._nonce(counter), self._key)

    def open(self, counter: int, data: bytes, ciphertext: bytes) -> bytes:
        """Raises AuthenticationError when the ciphertext, its data or its counter is not what was sealed."""
        try:
            return self.suite.decrypt(ciphertext, data, self._nonce(counter), self._key)
        except (nacl.exceptions.CryptoError, ValueError):
            raise AuthenticationError("a message failed authentication") from None

    def _nonce(self, counter: int) -> bytes:
        return counter.to_bytes(self.suite.nonce_size, "little")


def _derive(key: bytes, label: bytes, context: bytes = b"") -> bytes:
    """A 32-byte key from a 32-byte key (BLAKE2b keyed and personalized, RFC 7693)."""
    return blake2b(context, key=key, person=label.ljust(16, b"\0"), encoder=RawEncoder)


def _hash(*parts: bytes) -> bytes:
    """Hash of a sequence of byte strings, each with its length."""
    joined = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return blake2b(joined, person=b"lambda-split", encoder=RawEncoder)


class SessionKeys:
    """Both directions of one session's epoch, and the counter of what this side sealed."""

    def __init__(self, suite: Suite, send: bytes, receive: bytes, context: bytes) -> None:
        self._outgoing = Box(suite, _derive(send, b"session", context))
        self._incoming = Box(suite, _derive(receive, b"session", context))
        self._counters = itertools.count(1)
        self.tag_size = suite.tag_size

    def next_counter(self) -> int:
        """A nonce that was never used before, whichever threads ask."""
        return next(self._counters)

    def seal(self, header: Relay, plaintext: bytes) -> bytes:
        """Encrypts a body; `header.counter` must come from `next_counter`, one for each plaintext."""
        return self._outgoing.seal(header.counter, header.associated_data(), plaintext)

    def open(self, header: Relay, body: bytes) -> bytes:
        """Raises AuthenticationError."""
        return self._incoming.open(header.counter, header.associated_data(), body)


@dataclass
class Channel:
    """An authenticated channel: who the peer is, and the keys of its sessions."""

    peer: Certificate
    suite: Suite
    dtype: Dtype
    _send: bytes = field(repr=False)
    _receive: bytes = field(repr=False)
    born: float = field(default_factory=time.monotonic)

    @property
    def expired(self) -> bool:
        """Whether new sessions should go to a new channel."""
        return time.monotonic() - self.born > CHANNEL_LIFETIME

    def trusted(self, roster: Roster) -> bool:
        """Whether the peer's certificate still holds: it is neither revoked nor has it run out."""
        member = roster.by_sign_key(self.peer.sign_key)
        return member is not None and not member.revoked and time.time() < self.peer.not_after

    def session_keys(self, session: int, epoch: int) -> SessionKeys:
        return SessionKeys(self.suite, self._send, self._receive, struct.pack("<QQ", session, epoch))


class DeviceHandshake:
    """The device's side: `hello` is sent, `finish` takes the answer and gives the last message and the channel."""

    def __init__(self, identity: Identity, verify: Verify, service: Service, dtype: Dtype) -> None:
        self._identity = identity
        self._verify = verify
        self._public, self._secret = sodium.crypto_kx_keypair()
        self._offered = preferred_suites()
        self._dtype = dtype
        self.hello = msgspec.msgpack.encode(Hello(self._public, self._offered, service, dtype))

    def finish(self, message: bytes) -> tuple[bytes, Channel]:
        """Checks the worker's answer.

        Raises:
            Malformed, AuthenticationError, CertificateError: the answer is no proof of a worker of this fleet
                that serves what was asked for.
        """
        answer = _decode(message, Answer)
        if answer.suite not in self._offered:
            raise AuthenticationError(f"the worker chose a cipher that was not offered: {answer.suite[:32]!r}")
        suite = SUITES[answer.suite]
        receive, send = _exchange(
            sodium.crypto_kx_client_session_keys, self._public, self._secret, answer.ephemeral
        )
        transcript = _hash(self.hello, answer.ephemeral, answer.suite.encode())
        worker = _open_credentials(suite, receive, transcript, answer.credentials, "worker", self._verify)
        transcript = _hash(transcript, answer.credentials)
        credentials = _seal_credentials(suite, send, transcript, self._identity, "device")
        transcript = _hash(transcript, credentials)
        channel = Channel(
            worker,
            suite,
            self._dtype,
            _derive(send, b"traffic", transcript),
            _derive(receive, b"traffic", transcript),
        )
        return credentials, channel


class WorkerHandshake:
    """The worker's side: `answer` is sent back, `finish` takes the device's last message."""

    def __init__(self, identity: Identity, verify: Verify, service: Service, message: bytes) -> None:
        """Raises Malformed or AuthenticationError when the hello is not for this worker's body."""
        hello = _decode(message, Hello)
        if hello.service != service:
            raise AuthenticationError("a device asked for a body that this worker does not serve")
        self._verify = verify
        self._dtype = hello.dtype
        here = preferred_suites()
        both = [name for name in hello.suites if name in SUITES]
        name = next((name for name in both if name in here), both[0] if both else None)
        if name is None:
            raise AuthenticationError("no cipher in common with the device")
        self._suite = SUITES[name]
        public, secret = sodium.crypto_kx_keypair()
        self._receive, self._send = _exchange(sodium.crypto_kx_server_session_keys, public, secret, hello.ephemeral)
        transcript = _hash(message, public, name.encode())
        credentials = _seal_credentials(self._suite, self._send, transcript, identity, "worker")
        self._transcript = _hash(transcript, credentials)
        self.answer = msgspec.msgpack.encode(Answer(public, name, credentials))

    def finish(self, message: bytes) -> Channel:
        """Checks the device's credentials.

        Raises:
            Malformed, AuthenticationError, CertificateError: the message is no proof of a device of this fleet.
        """
        if len(message) > MAX_HANDSHAKE:
            raise Malformed("handshake message too large")
        device = _open_credentials(self._suite, self._receive, self._transcript, message, "device", self._verify)
        transcript = _hash(self._transcript, message)
        return Channel(
            device,
            self._suite,
            self._dtype,
            _derive(self._send, b"traffic", transcript),
            _derive(self._receive, b"traffic", transcript),
        )


def _decode(message: bytes, type_: type[_T]) -> _T:
    if len(message) > MAX_HANDSHAKE:
        raise Malformed("handshake message too large")
    try:
        return msgspec.msgpack.decode(message, type=type_)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"handshake: {error}") from None


def _exchange(
    kx: Callable[[bytes, bytes, bytes], tuple[bytes, bytes]], public: bytes, secret: bytes, peer: bytes
) -> tuple[bytes, bytes]:
    try:
        return kx(public, secret, peer)
    except Exception:
        raise AuthenticationError("the peer's ephemeral key is not acceptable") from None


def _statement(role: Role, transcript: bytes, certificate: bytes) -> bytes:
    return b"lambda-split channel " + role.encode() + b"\0" + _hash(transcript, certificate)


def _seal_credentials(suite: Suite, key: bytes, transcript: bytes, identity: Identity, role: Role) -> bytes:
    certificate = identity.certificate_bytes
    signature = identity.sign(_statement(role, transcript, certificate))
    box = Box(suite, _derive(key, b"handshake", transcript))
    return box.seal(0, transcript, msgspec.msgpack.encode(Credentials(certificate, signature)))


def _open_credentials(
    suite: Suite, key: bytes, transcript: bytes, sealed: bytes, role: Role, verify: Verify
) -> Certificate:
    box = Box(suite, _derive(key, b"handshake", transcript))
    credentials = _decode(box.open(0, transcript, sealed), Credentials)
    certificate = verify(credentials.certificate, role)
    try:
        sodium.crypto_sign_open(
            credentials.signature + _statement(role, transcript, credentials.certificate),
            certificate.sign_key,
        )
    except (nacl.exceptions.CryptoError, ValueError):
        raise AuthenticationError(f"{role} {certificate.name} did not sign this channel") from None
    return certificate
