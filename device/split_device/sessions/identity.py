"""What a session is called: by its user with a request id, on the wire by a key that says nothing about it."""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import struct
import threading
from collections import Counter
from dataclasses import dataclass

from split_common.errors import ConfigError
from split_common.protocol.headers import SessionRef, session_label

#: Longest request id, in characters: it stands in headers of HTTP and in lines of logs.
MAX_REQUEST_ID = 128

#: Request ids whose uses are counted under one key of the hash; then another key is drawn. About 100 bytes each.
MAX_COUNTED = 65536

_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID}}}")


def new_request_id() -> str:
    """A random request id: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def check_request_id(request_id: str) -> str:
    """Returns a request id. Raises ConfigError unless it is 1 to `MAX_REQUEST_ID` visible ASCII characters."""
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        raise ConfigError(
            f"invalid request id {str(request_id)[: 2 * MAX_REQUEST_ID]!r}: expected 1 to {MAX_REQUEST_ID} visible "
            "ASCII characters, without spaces"
        )
    return request_id


@dataclass(frozen=True)
class SessionIdentity:
    """The names of a session. It keeps them on all its workers."""

    request_id: str
    #: Its name on the wire, 16 bytes.
    key: bytes
    #: Its name for workers of version 1 of the protocol, which know numbers only.
    number: int

    @property
    def label(self) -> str:
        """The first 8 hexadecimal digits of its key, by which brokers, workers and dead letters name it."""
        return session_label(self.key)

    def on_wire(self, has_keys: bool) -> SessionRef:
        """Its name for a worker that knows keys, or does not."""
        return self.key if has_keys else self.number


class SessionNames:
    """Names the sessions of one process. Any thread may use it.

    A session's key is a keyed hash (BLAKE2b, RFC 7693) of its request id, the index of its choice, and how often
    the id was used before: one id twice is two sessions. The hash's key is random and never leaves the process.
    Therefore brokers and workers cannot tell from keys which sessions belong together, or how many there are. A job
    that continues after its process was killed has another key.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._renew()

    def _renew(self) -> None:
        self._secret = secrets.token_bytes(32)
        # How often each request id was used under this secret.
        self._uses: Counter[bytes] = Counter()

    def name(self, request_id: str | None = None, index: int = 0) -> SessionIdentity:
        """Names a new session.

        Args:
            request_id: the id of its request; None for a random one.
            index: which of the request's choices it computes, from 0.

        Raises:
            ConfigError: the id is not one, see `check_request_id`.
        """
        request_id = new_request_id() if request_id is None else check_request_id(request_id)
        data = request_id.encode()
        with self._lock:
            if len(self._uses) >= MAX_COUNTED:
                self._renew()
            uses = self._uses[data]
            self._uses[data] += 1
            secret, number = self._secret, next(self._numbers)
        digest = hashlib.blake2b(
            struct.pack("<QQ", index, uses) + data, digest_size=16, key=secret, person=b"session key"
        )
        return SessionIdentity(request_id, digest.digest(), number)
