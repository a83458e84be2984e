"""A ZMTP 3.0 connection by hand, secured by CurveZMQ: libzmq itself sends a message only once it is complete.

Sources: ZMTP 3.0 (RFC 23) and CurveZMQ (RFC 26) of rfc.zeromq.org.
"""

from __future__ import annotations

import os
import socket
import struct

import nacl.bindings as sodium

from split_common.errors import AuthenticationError
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Identity

#: Seconds that the other side may take to answer, or to take what is sent.
TIMEOUT = 5.0

#: The bits of a ZMTP frame's first byte, and of that of a CurveZMQ message.
MORE, LARGE, COMMAND = 1, 2, 4


def greeting(mechanism: bytes) -> bytes:
    """The first 64 bytes of a client's connection."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def connect(address: str) -> socket.socket:
    """A TCP connection that has exchanged greetings, for an address like `tcp://HOST:PORT`. Raises OSError."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), TIMEOUT)
    try:
        sock.sendall(greeting(b"CURVE"))
        _read(sock, 64)
    except BaseException:
        sock.close()
        raise
    return sock


class CurveConnection:
    """A connection as a DEALER, whose messages may have any number of frames.

    Args:
        address: of the broker.
        fleet: its roster has the broker's key.
        identity: whose keys authenticate the connection.

    Raises:
        AuthenticationError: the broker does not accept this member.
        OSError: it does not answer.
    """

    def __init__(self, address: str, fleet: Fleet, identity: Identity) -> None:
        broker = next(member for member in fleet.roster().members if member.role == "broker" and not member.revoked)
        self._nonces = 0
        self._public, self._secret = sodium.crypto_box_keypair()
        self._socket = connect(address)
        try:
            self._shake_hands(broker.curve_key, identity)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CurveConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send_frame(self, data: bytes, more: bool) -> None:
        """Sends one frame of a message at once. Raises OSError if the connection has ended."""
        short = self._next_nonce()
        flags = bytes((MORE if more else 0,))
        box = sodium.crypto_box_afternm(flags + data, b"CurveZMQMESSAGEC" + short, self._shared)
        self._write(b"\x07MESSAGE" + short + box, 0)

    def _shake_hands(self, broker: bytes, identity: Identity) -> None:
        short = self._next_nonce()
        box = sodium.crypto_box(bytes(64), b"CurveZMQHELLO---" + short, broker, self._secret)
        self._write(b"\x05HELLO\x01\x00" + bytes(72) + self._public + short + box, COMMAND)

        welcome = self._command(b"\x07WELCOME")
        plain = sodium.crypto_box_open(welcome[16:], b"WELCOME-" + welcome[:16], broker, self._secret)
        session, cookie = plain[:32], plain[32:]

        nonce, short = os.urandom(16), self._next_nonce()
        vouch = sodium.crypto_box(self._public + broker, b"VOUCH---" + nonce, session, identity.curve_secret)
        properties = _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b"")
        plain = identity.certificate.curve_key + nonce + vouch + properties
        box = sodium.crypto_box(plain, b"CurveZMQINITIATE" + short, session, self._secret)
        self._write(b"\x08INITIATE" + cookie + short + box, COMMAND)
        self._command(b"\x05READY")
        self._shared = sodium.crypto_box_beforenm(session, self._secret)

    def _next_nonce(self) -> bytes:
        self._nonces += 1
        return struct.pack(">Q", self._nonces)

    def _write(self, body: bytes, flags: int) -> None:
        if len(body) < 256:
            self._socket.sendall(bytes((flags, len(body))) + body)
        else:
            self._socket.sendall(bytes((flags | LARGE,)) + struct.pack(">Q", len(body)) + body)

    def _command(self, name: bytes) -> bytes:
        """The rest of the command that must come now."""
        (flags,) = _read(self._socket, 1)
        size = struct.unpack(">Q", _read(self._socket, 8))[0] if flags & LARGE else _read(self._socket, 1)[0]
        body = _read(self._socket, size)
        if not body.startswith(name):
            raise AuthenticationError("the broker does not accept this member's key")
        return body[len(name) :]


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + struct.pack(">I", len(value)) + value


def _read(sock: socket.socket, count: int) -> bytes:
    """Exactly this many bytes. Raises OSError if the connection ends before."""
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        if not got:
            raise ConnectionResetError("the connection has ended")
        data += got
    return data
