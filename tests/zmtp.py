"""A peer that speaks ZMTP 3.0 and CurveZMQ (RFC 23, 26) by hand, and so can send what libzmq never would."""

from __future__ import annotations

import os
import socket
import struct

from nacl.bindings import crypto_box, crypto_box_afternm, crypto_box_beforenm, crypto_box_keypair, crypto_box_open

from split_common.protocol import headers
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Identity

METADATA = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + b"\x08Identity" + struct.pack(">I", 0)


def greeting(mechanism: bytes) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def zmtp_frame(data: bytes, flags: int = 0) -> bytes:
    if len(data) < 256:
        return bytes((flags, len(data))) + data
    return bytes((flags | 2,)) + struct.pack(">Q", len(data)) + data


class RawPeer:
    """A connection to a broker whose frames are sent as they are. It reads nothing unless told to.

    Args:
        address: of the broker.
        fleet: whose broker it is.
        identity: over TCP, the member whose key the peer uses; a stranger without one stops before the handshake.
        buffer: the size in bytes of the kernel's buffer for what it does not read.
    """

    def __init__(
        self, address: str, fleet: Fleet | None = None, identity: Identity | None = None, buffer: int | None = None
    ) -> None:
        unix = address.startswith("ipc://")
        self.socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if unix:
            self.socket.connect(address.removeprefix("ipc://"))
        else:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            self.socket.connect((host, int(port)))
        self.socket.settimeout(300)
        self._key = b""
        self._nonce = 0
        self.socket.sendall(greeting(b"NULL" if unix else b"CURVE"))
        self._read(64)
        if unix:
            self.socket.sendall(zmtp_frame(b"\x05READY" + METADATA, 4))
            self._read_frame()
        elif identity is not None:
            assert fleet is not None
            self._shake_hands(fleet, identity)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.socket.recv(size - len(data))
            if not chunk:
                raise ConnectionResetError("the broker ended the connection")
            data += chunk
        return data

    def _read_frame(self) -> bytes:
        flags, size = self._read(2)
        if flags & 2:
            size = int.from_bytes(bytes((size,)) + self._read(7))
        return self._read(size)

    def _next(self) -> bytes:
        self._nonce += 1
        return struct.pack(">Q", self._nonce)

    def _shake_hands(self, fleet: Fleet, identity: Identity) -> None:
        server = next(member.curve_key for member in fleet.roster().members if member.role == "broker")
        public, secret = crypto_box_keypair()
        nonce = self._next()
        box = crypto_box(bytes(64), b"CurveZMQHELLO---" + nonce, server, secret)
        self.socket.sendall(zmtp_frame(b"\x05HELLO\x01\x00" + bytes(72) + public + nonce + box, 4))
        welcome = self._read_frame()
        plain = crypto_box_open(welcome[24:], b"WELCOME-" + welcome[8:24], server, secret)
        session, cookie = plain[:32], plain[32:]
        vouch_nonce, nonce = os.urandom(16), self._next()
        vouch = vouch_nonce + crypto_box(public + server, b"VOUCH---" + vouch_nonce, session, identity.curve_secret)
        self._key = crypto_box_beforenm(session, secret)
        box = crypto_box_afternm(
            identity.certificate.curve_key + vouch + METADATA, b"CurveZMQINITIATE" + nonce, self._key
        )
        self.socket.sendall(zmtp_frame(b"\x08INITIATE" + cookie + nonce + box, 4))
        assert self._read_frame().startswith(b"\x05READY")

    def send(self, data: bytes, more: bool = False) -> None:
        """Sends one frame of a message."""
        if not self._key:
            self.socket.sendall(zmtp_frame(data, int(more)))
            return
        nonce = self._next()
        box = crypto_box_afternm(bytes((more,)) + data, b"CurveZMQMESSAGEC" + nonce, self._key)
        self.socket.sendall(zmtp_frame(b"\x07MESSAGE" + nonce + box))

    def send_header(self, header: headers.Header) -> None:
        self.send(headers.encode_header(header), more=True)
        self.send(b"")

    def send_without_end(self, size: int) -> None:
        """Sends the first `size` bytes of a message."""
        for _ in range(size >> 20):
            self.send(bytes(1 << 20), more=True)

    def ended(self) -> bool:
        """Waits until the broker ends the connection; what it sends before is read and dropped."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True
