"""What both ends of a ZeroMQ connection set and do: keys, limits, and messages as frames."""

from __future__ import annotations

import zmq
import zmq.utils.z85

from split_common.errors import KeysError
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Identity

#: Plain integers, because arithmetic with pyzmq's enums takes longer than the calls that use them.
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

#: Complete messages of one connection that wait in libzmq, in each direction. What exceeds it waits in queues that
#: count bytes.
HIGH_WATER = 16

#: Milliseconds that a new connection has for its handshake. Until then a stranger may make it hold one frame.
HANDSHAKE_LIMIT = 2000


def curve_z85(identity: Identity) -> tuple[bytes, bytes]:
    """A member's X25519 public and secret key as ZeroMQ's CURVE takes them (RFC 32, Z85: 40 characters each)."""
    return zmq.utils.z85.encode(identity.certificate.curve_key), zmq.utils.z85.encode(identity.curve_secret)


def curve_client(sock: zmq.Socket[bytes], fleet: Fleet, identity: Identity) -> None:
    """Secures a client socket with CurveZMQ (RFC 26): it talks to the fleet's broker only.

    Raises:
        KeysError: the roster lists no broker that is not revoked.
    """
    public, secret = curve_z85(identity)
    broker = next((m for m in fleet.roster().members if m.role == "broker" and not m.revoked), None)
    if broker is None:
        raise KeysError(f"the roster in {fleet.path} lists no broker")
    sock.curve_publickey = public
    sock.curve_secretkey = secret
    sock.curve_serverkey = zmq.utils.z85.encode(broker.curve_key)


def send_frames(sock: zmq.Socket[bytes], *frames: zmq.Frame | bytes) -> None:
    """Sends a message without blocking. Its last frame is not copied if it is large.

    Raises:
        zmq.Again: the socket accepts nothing for the moment.
    """
    for frame in frames[:-1]:
        sock.send(frame, _NOBLOCK_MORE)
    sock.send(frames[-1], _NOBLOCK, copy=False)


def receive_frames(sock: zmq.Socket[bytes], most: int) -> list[zmq.Frame]:
    """The next message. Of one that has more than `most` frames, the first `most + 1`: the rest is not kept.

    Raises:
        zmq.Again: none came within the socket's `rcvtimeo`.
    """
    frames = [sock.recv(copy=False)]
    while frames[-1].more and len(frames) <= most:
        frames.append(sock.recv(copy=False))
    more = frames[-1].more
    while more:
        more = sock.recv(copy=False).more
    return frames
