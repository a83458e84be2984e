"""Routing headers: the first frame of each message, in the clear. It is all that the broker reads.

A message is two frames. The first is a version byte and a msgspec header. The second is a body that only the two
ends can open (`split_common.channel`, `split_common.payloads`); the broker passes it on unread.

Headers are untrusted input: decoding checks each length and range, and raises a `ProtocolError`. They travel as
arrays, so the order of fields and the tags are the format; the names of classes and fields are not.

Nothing here imports torch: the broker is small.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sized
from enum import IntEnum
from typing import Annotated, Literal, TypeVar

import msgspec

from split_common.errors import Malformed, Oversized, VersionMismatch

#: Version of the protocol; the first byte of every header. Peers of another version are refused.
VERSION = 1

#: Largest header, in bytes.
MAX_HEADER = 64 * 1024

#: Largest body, in bytes. Longer steps travel in chunks.
MAX_BODY = 16 * 1024 * 1024

#: Largest frame that a socket takes, in bytes; it closes the connection on a larger one. A body just above its
#: limit arrives, and is refused and counted.
MAX_FRAME = MAX_BODY + 64 * 1024

#: Longest wait that one peer may ask another for, in seconds.
MAX_RETRY_AFTER = 60.0

#: Most peers that one announcement may watch.
MAX_WATCHED = 4096

PeerId = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Text = Annotated[str, msgspec.Meta(max_length=512)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_RETRY_AFTER)]


class Header(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """First frame of a message, in the clear: what the broker needs to route it."""


class Service(msgspec.Struct, array_like=True, frozen=True):
    """What a worker serves: the body `[first, last)` of the model with this manifest root."""

    root: Hash
    first: Natural
    last: Natural


class Announce(Header, frozen=True, tag=1):
    """A peer's heartbeat: all that a broker that has just started needs to know of it.

    Of a device's, `service`, `model` and `room` mean nothing.
    """

    sender: PeerId
    role: Literal["device", "worker"]
    member: Text
    #: Bodies of all messages received so far, in bytes: the broker's credit.
    received: Natural = 0
    #: Peers whose death this one wants to hear of.
    watching: Annotated[list[PeerId], msgspec.Meta(max_length=MAX_WATCHED)] = []
    service: Service | None = None
    model: Text = ""
    #: Sessions that a worker still has room for.
    room: Natural = 0
    #: It does not serve any more: it ends, or computes nothing though it has work.
    leaving: bool = False


class Welcome(Header, frozen=True, tag=2):
    """The broker's answer to an announcement, and its word when a watched peer is gone."""

    #: Identifies this run of the broker: a new one has forgotten what was in flight.
    boot: PeerId
    roster_version: Natural = 0
    gone: Annotated[list[PeerId], msgspec.Meta(max_length=MAX_WATCHED)] = []


class Probe(Header, frozen=True, tag=3):
    """Sent by the broker to find out whether a connection still stands; ignored by the peer."""


class RosterRequest(Header, frozen=True, tag=4):
    """A peer asks for the fleet's roster."""

    sender: PeerId


class RosterReply(Header, frozen=True, tag=5):
    """The operator-signed roster is the body."""


class Open(Header, frozen=True, tag=6):
    """A device looks for any worker of a service; the body is the channel's first message."""

    sender: PeerId
    channel: Natural
    service: Service
    #: Workers that the device does not want, e.g. because they have just refused it.
    avoid: Annotated[list[PeerId], msgspec.Meta(max_length=64)] = []


class Kind(IntEnum):
    """What a relayed body is. Of a worker's replies, those of session 0 are the channel's own."""

    ANSWER = 1
    FINISH = 2
    REQUEST = 3
    REPLY = 4
    #: A worker does not know the channel (any more). It has no keys to say so with: it sends the hash of what it
    #: was sent (`echo`), so that nothing damaged or old, nor an answer to that, is taken for it.
    UNKNOWN = 5


class Relay(Header, frozen=True, tag=7):
    """A message of a channel, from one peer to another."""

    to: PeerId
    sender: PeerId
    kind: Kind
    channel: Natural
    session: Natural = 0
    epoch: Natural = 0
    seq: Natural = 0
    #: The nonce of this body: never used twice in one direction of a session's epoch.
    counter: Natural = 0

    def associated_data(self) -> bytes:
        """The fields that the body's authentication covers. The direction is bound by the key."""
        return struct.pack(
            "<BBQQQQQ", VERSION, self.kind, self.channel, self.session, self.epoch, self.seq, self.counter
        )


class Bounce(Header, frozen=True, tag=8):
    """The broker could not deliver a message."""

    reason: Literal["no-worker", "busy", "gone", "full", "revoked"]
    channel: Natural = 0
    session: Natural = 0
    seq: Natural = 0
    peer: PeerId = bytes(8)
    detail: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    retry_after: Seconds = 0.0
    epoch: Natural = 0


AnyHeader = Announce | Welcome | Probe | RosterRequest | RosterReply | Open | Relay | Bounce

_Sized = TypeVar("_Sized", bound=Sized)

_header_decoder = msgspec.msgpack.Decoder(AnyHeader)
_header_encoder = msgspec.msgpack.Encoder()


def encode_header(header: Header) -> bytes:
    """The first frame of a message."""
    return bytes((VERSION,)) + _header_encoder.encode(header)


def decode_header(frame: bytes | memoryview) -> AnyHeader:
    """Reads a first frame.

    Raises:
        Oversized, VersionMismatch, Malformed: the frame is no header of this protocol.
    """
    if len(frame) > MAX_HEADER:
        raise Oversized(f"header of {len(frame)} bytes (at most {MAX_HEADER})")
    if not len(frame):
        raise Malformed("empty header")
    view = memoryview(frame)
    if view[0] != VERSION:
        raise VersionMismatch(f"the peer speaks protocol version {view[0]}, this is version {VERSION}")
    try:
        header: AnyHeader = _header_decoder.decode(view[1:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"header: {error}") from None
    return header


def echo(header: Relay, body: bytes) -> bytes:
    """What an `UNKNOWN` says of the message that it answers: this one, as it arrived, and no other."""
    return hashlib.blake2b(header.sender + header.associated_data() + body, digest_size=32).digest()


def check_body(frame: _Sized) -> _Sized:
    """Takes a second frame as it is. Raises Oversized."""
    if len(frame) > MAX_BODY:
        raise Oversized(f"body of {len(frame)} bytes (at most {MAX_BODY})")
    return frame
