"""A secret key sealed under a passphrase: Argon2id (RFC 9106) makes a key of it, XSalsa20-Poly1305 seals.

The file: `MAGIC`, a salt (16 bytes), Argon2id's passes and kilobytes (8 bytes each, little-endian), and the nonce,
tag and ciphertext of NaCl's secretbox (24, 16 and as many bytes as the secret has).
"""

from __future__ import annotations

import os
import struct
import sys
from getpass import getpass
from pathlib import Path
from typing import Final

from nacl.exceptions import CryptoError
from nacl.pwhash import argon2id
from nacl.secret import SecretBox
from nacl.utils import random

from split_common.errors import KeysError

MAGIC: Final = b"lambda-split sealed 1\0"

#: The most that a file may ask Argon2id for: operations, and bytes of memory.
MAX_OPERATIONS: Final = 64
MAX_MEMORY: Final = 1 << 30

_HEADER: Final = struct.Struct(f"<{argon2id.SALTBYTES}sQQ")


def is_sealed(data: bytes) -> bool:
    """Whether `seal_secret` made these bytes."""
    return data.startswith(MAGIC)


def seal_secret(
    secret: bytes,
    passphrase: str,
    operations: int = argon2id.OPSLIMIT_MODERATE,
    memory: int = argon2id.MEMLIMIT_MODERATE,
) -> bytes:
    """Seals a secret. With the default limits that takes about a second, as does `open_secret`.

    Args:
        operations, memory: limits of Argon2id: passes, and bytes.

    Raises:
        KeysError: the passphrase is empty.
    """
    if not passphrase:
        raise KeysError("the passphrase is empty")
    salt = random(argon2id.SALTBYTES)
    key = argon2id.kdf(SecretBox.KEY_SIZE, passphrase.encode(), salt, operations, memory)
    return MAGIC + _HEADER.pack(salt, operations, memory // 1024) + SecretBox(key).encrypt(secret)


def open_secret(data: bytes, passphrase: str) -> bytes:
    """Opens what `seal_secret` made.

    Raises:
        KeysError: the bytes are damaged, or the passphrase is another one.
    """
    body = data.removeprefix(MAGIC)
    if len(body) < _HEADER.size:
        raise KeysError("it is damaged")
    salt, operations, kilobytes = _HEADER.unpack_from(body)
    memory = kilobytes * 1024
    if not (
        argon2id.OPSLIMIT_MIN <= operations <= MAX_OPERATIONS and argon2id.MEMLIMIT_MIN <= memory <= MAX_MEMORY
    ):
        raise KeysError("it is damaged")
    try:
        key = argon2id.kdf(SecretBox.KEY_SIZE, passphrase.encode(), salt, operations, memory)
        return SecretBox(key).decrypt(body[_HEADER.size :])
    except (CryptoError, ValueError):
        raise KeysError("the passphrase is wrong, or it is damaged") from None


def ask_passphrase(path: Path, again: bool = False) -> str:
    """The passphrase of the operator's key: `LAMBDA_SPLIT_PASSPHRASE`, or what is typed on the terminal.

    Args:
        path: the key's file, for the question.
        again: whether it has to be typed twice.

    Raises:
        KeysError: there is no terminal, or the second passphrase differs.
    """
    given = os.environ.get("LAMBDA_SPLIT_PASSPHRASE")
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise KeysError("it needs a passphrase: set LAMBDA_SPLIT_PASSPHRASE, or run the command on a terminal")
    typed = getpass(f"Passphrase of {path}: ")
    if again and getpass("The same again: ") != typed:
        raise KeysError("the two passphrases differ")
    return typed
