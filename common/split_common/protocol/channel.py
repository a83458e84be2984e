"""End-to-end encryption between a device and a worker. `split_common.protocol.handshake` sets a channel up.

Each session and epoch has its own keys, derived from the channel's. The nonce of a body is its header's counter,
which is never used twice. A body that is sent again is sent byte for byte as before, not sealed again.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import nacl.bindings as sodium
import nacl.exceptions
from nacl.encoding import RawEncoder
from nacl.hash import blake2b

from split_common.errors import AuthenticationError, UnsupportedFeature
from split_common.protocol.headers import Relay, SessionRef
from split_common.protocol.payloads import Dtype
from split_common.trust.keys import Certificate, Roster

#: Age of a channel, in seconds, above which a device sets up another one for new sessions.
CHANNEL_LIFETIME = 3600.0

#: Sessions that a device opens over one channel before it sets up another one.
CHANNEL_SESSIONS = 65536


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
    """Names of the suites to offer, the fastest first. AEGIS is offered only if the CPU has AES instructions."""
    try:
        sodium.crypto_aead_aes256gcm_encrypt(b"", b"", bytes(12), bytes(32))
    except Exception:
        return [XCHACHA.name]
    return [AEGIS.name, XCHACHA.name]


class Box:
    """One direction of encryption: an AEAD with one key. The nonce is a counter, which a caller must not repeat."""

    def __init__(self, suite: Suite, key: bytes) -> None:
        self.suite = suite
        self._key = key[: suite.key_size]

    def seal(self, counter: int, data: bytes, plaintext: bytes) -> bytes:
        return self.suite.encrypt(plaintext, data, self._nonce(counter), self._key)

    def open(self, counter: int, data: bytes, ciphertext: bytes) -> bytes:
        """Decrypts what `seal` made.

        Raises:
            AuthenticationError: the ciphertext, its data or its counter is not what was sealed.
        """
        try:
            return self.suite.decrypt(ciphertext, data, self._nonce(counter), self._key)
        except (nacl.exceptions.CryptoError, ValueError):
            raise AuthenticationError("a message failed authentication") from None

    def _nonce(self, counter: int) -> bytes:
        return counter.to_bytes(self.suite.nonce_size, "little")


def derive_key(key: bytes, label: bytes, context: bytes = b"") -> bytes:
    """Derives a key from a key, 32 bytes each, by keyed and personalized BLAKE2b (RFC 7693)."""
    return blake2b(context, key=key, person=label.ljust(16, b"\0"), encoder=RawEncoder)


class EpochKeys:
    """The keys of one session's epoch, one for each direction, and the counter of the bodies that are sealed."""

    def __init__(self, suite: Suite, send: bytes, receive: bytes, context: bytes) -> None:
        self._outgoing = Box(suite, derive_key(send, b"session", context))
        self._incoming = Box(suite, derive_key(receive, b"session", context))
        self._counters = itertools.count(1)
        self.tag_size = suite.tag_size

    def next_counter(self) -> int:
        """Returns a nonce that was never used before. Safe to call from several threads."""
        return next(self._counters)

    def seal(self, header: Relay, plaintext: bytes) -> bytes:
        """Encrypts a body. `header.counter` must come from `next_counter`, and be new for each plaintext."""
        return self._outgoing.seal(header.counter, header.associated_data(), plaintext)

    def open(self, header: Relay, body: bytes) -> bytes:
        """Decrypts a body of the peer.

        Raises:
            AuthenticationError: the body, or a field of the header that it depends on, was changed.
        """
        return self._incoming.open(header.counter, header.associated_data(), body)


@dataclass
class Channel:
    """An authenticated channel: its peer, what both ends support, and the keys for its sessions."""

    peer: Certificate
    suite: Suite
    dtype: Dtype
    #: The capabilities that both ends have.
    capabilities: frozenset[str]
    _send: bytes = field(repr=False)
    _receive: bytes = field(repr=False)
    born: float = field(default_factory=time.monotonic)

    @property
    def expired(self) -> bool:
        """Whether new sessions should use another channel."""
        return time.monotonic() - self.born > CHANNEL_LIFETIME

    def trusted(self, roster: Roster) -> bool:
        """Whether the peer is still a member: neither revoked nor with an expired certificate."""
        member = roster.by_sign_key(self.peer.sign_key)
        return member is not None and not member.revoked and time.time() < self.peer.not_after

    def require(self, needs: frozenset[str]) -> None:
        """Checks that the peer has the capabilities that a request needs.

        Raises:
            UnsupportedFeature: it lacks one of them.
        """
        if missing := needs - self.capabilities:
            raise UnsupportedFeature(
                f"{self.peer.role} {self.peer.name!r} does not support {', '.join(sorted(missing))}: "
                "it runs an older version of lambda-split; update it"
            )

    def epoch_keys(self, session: SessionRef, epoch: int) -> EpochKeys:
        """Derives the keys of a session's epoch. Derive them once: their counter begins at 1."""
        form = "<16sQ" if isinstance(session, bytes) else "<QQ"
        return EpochKeys(self.suite, self._send, self._receive, struct.pack(form, session, epoch))
