"""How a device and a worker set up a channel: they prove who they are, and agree on keys and capabilities.

A channel is set up in three messages, in the SIGMA-I pattern (Krawczyk, "SIGMA: the SIGn-and-MAc Approach to
Authenticated Diffie-Hellman", 2003) over libsodium's `crypto_kx`:

1. `Hello`, device to any worker: an ephemeral X25519 key, the ciphers it offers, the service it asks for, its
   version of the set-up and its capabilities.
2. `Answer`, worker to device: its ephemeral key, the cipher, its version and its capabilities; sealed: its
   certificate and its signature of the transcript.
3. `Finish`, device to worker: sealed: its certificate and its signature of the transcript.

The worker confirms the third message under the channel's own keys (those of session 0), so any of them may be lost
and sent again. Neither side spends memory on a session before that.

Ephemeral keys are dropped after set-up: a key stolen later does not decrypt what was recorded earlier.

**Versions and capabilities.** The two sides use the lower of their versions, and the capabilities that both name;
names that a side does not know are ignored. Peers of version 1, which has neither field, are still understood: a
fleet can be updated one machine at a time. This works because

- fields are only ever appended to the messages, and decoders ignore fields that follow those they know;
- the transcript contains the hello as it arrived, fields that the worker does not know included;
- a worker answers a hello of version 1 with an answer of version 1;
- a peer of version 1 counts as having what version 1 had, `VERSION_1_CAPABILITIES`.

A change that every peer has to follow is not a capability. It needs another `headers.VERSION`, and peers of other
versions are refused with a `VersionMismatch`.

**Downgrades.** Signatures and keys depend on the transcript: the whole hello, and all of the answer. Each side
computes it from what it sent itself and what it received. If a version or capability is changed on the way, the two
transcripts differ, and the next sealed message does not open.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
import nacl.bindings as sodium
import nacl.exceptions
from nacl.encoding import RawEncoder
from nacl.hash import blake2b

from split_common.errors import AuthenticationError, CertificateError, Malformed
from split_common.protocol.capabilities import CAPABILITIES
from split_common.protocol.channel import SUITES, Box, Channel, Suite, derive_key, preferred_suites
from split_common.protocol.headers import Hash, Service
from split_common.protocol.payloads import Dtype
from split_common.trust.keys import Certificate, Identity, Role

#: Largest handshake message, in bytes. A certificate of the largest size fits.
MAX_HANDSHAKE = 80 * 1024

#: Version of the set-up. Version 2 added the version itself and capabilities.
SETUP_VERSION = 2

#: Capabilities of peers of version 1, which do not name theirs.
VERSION_1_CAPABILITIES = frozenset({"fork", "int4", "int8"})

#: Most capabilities that a peer may name.
MAX_CAPABILITIES = 64

_T = TypeVar("_T")

#: Checks a peer's signed certificate for a role and returns it. Raises CertificateError.
Verify = Callable[[bytes, Role], Certificate]

#: Version of the set-up.
Version = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
#: Name of a capability: 1 to 32 characters.
Capability = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9.-]{0,31}\Z")]


class Hello(msgspec.Struct, array_like=True, frozen=True):
    """The device's first message. Only ever append fields: peers of other versions read it, too."""

    ephemeral: Hash
    #: AEADs by name, the preferred one first.
    suites: Annotated[list[str], msgspec.Meta(min_length=1, max_length=8)]
    service: Service
    #: Dtype of the hidden states over this channel.
    dtype: Dtype
    version: Version = 1
    #: In ascending order, each once.
    capabilities: Annotated[list[Capability], msgspec.Meta(max_length=MAX_CAPABILITIES)] = []


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The worker's answer to a `Hello`. Only ever append fields: peers of other versions read it, too."""

    ephemeral: Hash
    #: Name of the AEAD that the worker chose.
    suite: str
    #: Sealed `Credentials`.
    credentials: bytes
    version: Version = 1
    #: In ascending order, each once.
    capabilities: Annotated[list[Capability], msgspec.Meta(max_length=MAX_CAPABILITIES)] = []

    def encode(self) -> bytes:
        """Returns the message. One of version 1 ends with the credentials."""
        fields = msgspec.structs.astuple(self)
        return msgspec.msgpack.encode(fields if self.version > 1 else fields[:3])


class Credentials(msgspec.Struct, array_like=True, frozen=True):
    """A signed certificate, and a signature of the transcript by the certificate's key."""

    certificate: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class DeviceHandshake:
    """The device's side of one set-up: `hello` is sent; `finish` takes the answer.

    Args:
        identity: this device.
        verify: checks the worker's certificate.
        service: the body that the device needs.
        dtype: dtype of the hidden states.
        capabilities: this device's capabilities.
    """

    def __init__(
        self,
        identity: Identity,
        verify: Verify,
        service: Service,
        dtype: Dtype,
        capabilities: frozenset[str] = CAPABILITIES,
    ) -> None:
        self._identity = identity
        self._verify = verify
        self._public, self._secret = sodium.crypto_kx_keypair()
        self._offered = preferred_suites()
        self._dtype = dtype
        self._capabilities = capabilities
        hello = Hello(self._public, self._offered, service, dtype, SETUP_VERSION, sorted(capabilities))
        self.hello = msgspec.msgpack.encode(hello)

    def finish(self, message: bytes) -> tuple[bytes, Channel]:
        """Checks the worker's answer.

        Returns:
            The last message of the set-up, and the channel.

        Raises:
            Malformed: the message is not an answer.
            AuthenticationError: it does not prove that it is a worker's answer to this hello.
            CertificateError: the worker's certificate is of another fleet, role, time or body, or is revoked. If
                the error has a `member`, that member has shown it.
        """
        answer = _decode(message, Answer)
        if answer.suite not in self._offered:
            raise AuthenticationError(f"the worker chose a cipher that was not offered: {answer.suite[:32]!r}")
        suite = SUITES[answer.suite]
        capabilities = self._capabilities & _named(answer)
        receive, send = _exchange(
            sodium.crypto_kx_client_session_keys, self._public, self._secret, answer.ephemeral
        )
        transcript = _transcript(self.hello, answer)
        worker = _open_credentials(suite, receive, transcript, answer.credentials, "worker", self._verify)
        transcript = _hash(transcript, answer.credentials)
        credentials = _seal_credentials(suite, send, transcript, self._identity, "device")
        transcript = _hash(transcript, credentials)
        channel = Channel(
            worker,
            suite,
            self._dtype,
            capabilities,
            derive_key(send, b"traffic", transcript),
            derive_key(receive, b"traffic", transcript),
        )
        return credentials, channel


class WorkerHandshake:
    """The worker's side of one set-up: `answer` is sent back; `finish` takes the device's last message.

    Args:
        identity: this worker.
        verify: checks the device's certificate.
        service: the body that this worker serves.
        message: the device's hello.
        capabilities: those of this version.
        lacks: which of them do not hold for this worker's body.

    Raises:
        Malformed: the message is not a hello.
        AuthenticationError: it asks for another body, offers no known cipher, or its key is unusable.
    """

    def __init__(
        self,
        identity: Identity,
        verify: Verify,
        service: Service,
        message: bytes,
        capabilities: frozenset[str] = CAPABILITIES,
        lacks: frozenset[str] = frozenset(),
    ) -> None:
        capabilities -= lacks
        hello = _decode(message, Hello)
        if hello.service != service:
            raise AuthenticationError("a device asked for a body that this worker does not serve")
        self._verify = verify
        self._dtype = hello.dtype
        self._capabilities = capabilities & _named(hello)
        here = preferred_suites()
        both = [name for name in hello.suites if name in SUITES]
        name = next((name for name in both if name in here), both[0] if both else None)
        if name is None:
            raise AuthenticationError("no cipher in common with the device")
        self._suite = SUITES[name]
        public, secret = sodium.crypto_kx_keypair()
        self._receive, self._send = _exchange(sodium.crypto_kx_server_session_keys, public, secret, hello.ephemeral)
        answer = Answer(public, name, b"")
        if hello.version > 1:
            answer = Answer(public, name, b"", SETUP_VERSION, sorted(capabilities))
        transcript = _transcript(message, answer)
        credentials = _seal_credentials(self._suite, self._send, transcript, identity, "worker")
        self._transcript = _hash(transcript, credentials)
        self.answer = msgspec.structs.replace(answer, credentials=credentials).encode()

    def finish(self, message: bytes) -> Channel:
        """Checks the device's credentials.

        Raises:
            Malformed: the message is too large, or does not hold credentials.
            AuthenticationError: it does not prove that a device received this answer.
            CertificateError: the device's certificate is of another fleet, role, time or body, or is revoked.
        """
        if len(message) > MAX_HANDSHAKE:
            raise Malformed("handshake message too large")
        device = _open_credentials(self._suite, self._receive, self._transcript, message, "device", self._verify)
        transcript = _hash(self._transcript, message)
        return Channel(
            device,
            self._suite,
            self._dtype,
            self._capabilities,
            derive_key(self._send, b"traffic", transcript),
            derive_key(self._receive, b"traffic", transcript),
        )


def _decode(message: bytes, type_: type[_T]) -> _T:
    if len(message) > MAX_HANDSHAKE:
        raise Malformed("handshake message too large")
    try:
        return msgspec.msgpack.decode(message, type=type_)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"handshake: {error}") from None


def _named(message: Hello | Answer) -> frozenset[str]:
    """Returns a peer's capabilities, including unknown ones. Raises Malformed if they are not in order."""
    names = message.capabilities
    if names != sorted(set(names)):
        raise Malformed("handshake: the capabilities are not in ascending order")
    return frozenset(names) if message.version > 1 else VERSION_1_CAPABILITIES


def _transcript(hello: bytes, answer: Answer) -> bytes:
    """Digest of the hello, byte for byte, and of the answer's unencrypted fields."""
    if answer.version == 1:
        return _hash(hello, answer.ephemeral, answer.suite.encode())
    version = struct.pack("<Q", answer.version)
    return _hash(hello, answer.ephemeral, answer.suite.encode(), version, *map(str.encode, answer.capabilities))


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
    box = Box(suite, derive_key(key, b"handshake", transcript))
    return box.seal(0, transcript, msgspec.msgpack.encode(Credentials(certificate, signature)))


def _open_credentials(
    suite: Suite, key: bytes, transcript: bytes, sealed: bytes, role: Role, verify: Verify
) -> Certificate:
    box = Box(suite, derive_key(key, b"handshake", transcript))
    credentials = _decode(box.open(0, transcript, sealed), Credentials)

    def check_signature(name: str | None, key: bytes) -> None:
        signed = credentials.signature + _statement(role, transcript, credentials.certificate)
        try:
            sodium.crypto_sign_open(signed, key)
        except (nacl.exceptions.CryptoError, ValueError):
            raise AuthenticationError(f"{role} {name} did not sign this channel") from None

    try:
        certificate = verify(credentials.certificate, role)
    except CertificateError as error:
        # It counts against a member only if that member shows it.
        if error.sign_key is not None:
            check_signature(error.member, error.sign_key)
        raise
    check_signature(certificate.name, certificate.sign_key)
    return certificate


def _hash(*parts: bytes) -> bytes:
    """Digest (32 bytes) of a sequence of byte strings, each preceded by its length."""
    joined = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return blake2b(joined, person=b"lambda-split", encoder=RawEncoder)
