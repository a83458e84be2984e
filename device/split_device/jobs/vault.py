"""Seals the prompts and answers in a store, under a key in a separate file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nacl.exceptions import CryptoError
from nacl.secret import Aead

from split_common.errors import KeysError, StoreLocked
from split_common.system.files import read_private, write_private

#: Size of a key, in bytes.
KEY_BYTES = Aead.KEY_SIZE


class Vault:
    """XChaCha20-Poly1305 with a value's place in the store as associated data. Without a key nothing is sealed."""

    def __init__(self, key: bytes | None = None) -> None:
        self._aead = Aead(key) if key is not None else None
        self._key = key or b""

    def seal(self, data: bytes, place: str) -> bytes:
        return data if self._aead is None else bytes(self._aead.encrypt(data, place.encode()))

    def open(self, data: bytes, place: str) -> bytes:
        """Raises StoreLocked if the data was sealed under another key, or for another place."""
        if self._aead is None:
            return data
        try:
            return self._aead.decrypt(data, place.encode())
        except (CryptoError, ValueError):
            raise StoreLocked("the store's key does not open what it holds") from None

    def digest(self, data: bytes) -> bytes:
        """32 bytes by which equal values are found (BLAKE2b); only who has the store's key can try out guesses."""
        return hashlib.blake2b(data, digest_size=32, key=self._key, person=b"lambda-split").digest()


def read_key(path: Path) -> bytes:
    """The key in a file. Raises KeysError if the file is missing, readable by others, or not a key."""
    key = read_private(path)
    if len(key) != KEY_BYTES:
        raise KeysError(f"{path} does not hold a key of {KEY_BYTES} bytes")
    return key


def make_key(path: Path) -> bytes:
    """Writes a new random key to a file. Raises KeysError if the file cannot be written."""
    key = os.urandom(KEY_BYTES)
    write_private(path, key)
    return key
