"""Routing headers: the first frame of each message, in the clear. It is all that the broker reads.

A message is two frames. The first is a version byte and a msgspec header. The second is a body that only the two
ends can open (`split_common.protocol.payloads`, `split_common.protocol.channel`); the broker passes it on unread.

Headers are untrusted input: decoding checks each length and range, and raises a `ProtocolError`. They travel as
arrays, so the order of fields and the tags are the format; the names of classes and fields are not.

Nothing here imports torch, so the broker stays small.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sized
from enum import IntEnum
from typing import Annotated, Literal, TypeVar

import msgspec

from split_common.errors import Malformed, Oversized, VersionMismatch

#: Version of the protocol: the first byte of headers that name a session by its key, and of announcements.
VERSION = 2

#: First byte of all other headers, which peers of version 1 understand. Those peers number their sessions.
VERSION_1 = 1

#: Largest header, in bytes.
MAX_HEADER = 64 * 1024

#: Largest body, in bytes. Larger steps travel in several messages.
MAX_BODY = 16 * 1024 * 1024

#: Largest frame that a socket accepts, in bytes; a larger one closes the connection. It exceeds `MAX_BODY`: a body
#: slightly above that limit arrives, and is refused and counted.
MAX_FRAME = MAX_BODY + 64 * 1024

#: Longest wait that one peer may ask another for, in seconds.
MAX_RETRY_AFTER = 60.0

#: Most peers that one announcement may watch.
MAX_WATCHED = 4096

#: Most workers that a device can vouch for in one announcement.
MAX_ANSWERED = 64

#: Identifies a connection of a member for as long as its process runs (`split_common.transport.new_peer_id`).
PeerId = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
#: A SHA-256 or BLAKE2b digest, or an X25519 public key.
Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
#: Names a session without saying anything about it (`split_device.sessions.identity`).
SessionKey = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
#: A session's key; its number if one of the peers is of version 1; or 0 for the channel itself.
SessionRef = Natural | SessionKey
Text = Annotated[str, msgspec.Meta(max_length=512)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_RETRY_AFTER)]


class Header(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of all headers."""


class Service(msgspec.Struct, array_like=True, frozen=True):
    """What a worker serves: the body `[first, last)` of the model with this manifest root."""

    root: Hash
    first: Natural
    last: Natural


class Announce(Header, frozen=True, tag=1):
    """A peer's heartbeat. It says everything about the peer that a newly started broker needs to know.

    To a broker, the body is the member's certificate, as the operator signed it. Older peers send none, and older
    brokers ignore it. Devices leave `service`, `model` and `room` at their defaults.
    """

    sender: PeerId
    role: Literal["device", "worker"]
    member: Text
    #: Bytes of all bodies received so far; the broker limits how many more may be on the way.
    received: Natural = 0
    #: Peers of whose death this peer is told.
    watching: Annotated[list[PeerId], msgspec.Meta(max_length=MAX_WATCHED)] = []
    service: Service | None = None
    model: Text = ""
    #: Further sessions that the worker can hold.
    room: Natural = 0
    #: The peer no longer serves: its process ends, or its compute loop is stuck.
    leaving: bool = False
    #: Workers that have answered requests of this device.
    answered: Annotated[list[PeerId], msgspec.Meta(max_length=MAX_ANSWERED)] = []


class Welcome(Header, frozen=True, tag=2):
    """The broker's answer to an announcement; also sent when a watched peer is gone."""

    #: Identifies this run of the broker. A different one means that what was in flight is lost.
    boot: PeerId
    roster_version: Natural = 0
    gone: Annotated[list[PeerId], msgspec.Meta(max_length=MAX_WATCHED)] = []


class Probe(Header, frozen=True, tag=3):
    """Sent by the broker to test a connection; peers ignore it."""


class RosterRequest(Header, frozen=True, tag=4):
    """A peer asks for the fleet's roster."""

    sender: PeerId


class RosterReply(Header, frozen=True, tag=5):
    """Answers a `RosterRequest`; the body is the signed roster."""


class Open(Header, frozen=True, tag=6):
    """A device asks for a channel to any worker of a service; the body is the channel's `Hello`."""

    sender: PeerId
    channel: Natural
    service: Service
    #: Workers that must not get the open, e.g. because they refused the device recently.
    avoid: Annotated[list[PeerId], msgspec.Meta(max_length=64)] = []


class RelayKind(IntEnum):
    """What a relayed body is. Replies with session 0 concern the channel itself."""

    ANSWER = 1
    FINISH = 2
    REQUEST = 3
    REPLY = 4
    #: The worker does not know the channel, so it has no keys to seal its answer. The body is a digest (`echo`) of
    #: the message that it answers; the device ignores it unless that message is in flight.
    UNKNOWN = 5


class Relay(Header, frozen=True, tag=7):
    """A message over a channel, from one peer to another."""

    to: PeerId
    sender: PeerId
    kind: RelayKind
    channel: Natural
    session: SessionRef = 0
    epoch: Natural = 0
    seq: Natural = 0
    #: Nonce of this body, never used twice in one direction of a session's epoch.
    counter: Natural = 0

    def associated_data(self) -> bytes:
        """The bytes that the body's AEAD authenticates with it. Peers and direction are bound by the key."""
        version, form = (VERSION, "<BBQ16sQQQ") if isinstance(self.session, bytes) else (VERSION_1, "<BBQQQQQ")
        return struct.pack(form, version, self.kind, self.channel, self.session, self.epoch, self.seq, self.counter)


class Bounce(Header, frozen=True, tag=8):
    """A message could not be delivered. The fields repeat those of its header; `peer` is its receiver."""

    reason: Literal["no-worker", "busy", "gone", "full", "revoked"]
    channel: Natural = 0
    session: SessionRef = 0
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
    """Returns the first frame of a message, in the lowest version that has all that the header names."""
    version = VERSION if _is_of_version_2(header) else VERSION_1
    return bytes((version,)) + _header_encoder.encode(header)


def decode_header(frame: bytes | memoryview) -> AnyHeader:
    """Decodes the first frame of a message.

    Raises:
        Oversized: the frame is larger than `MAX_HEADER`.
        VersionMismatch: it was made by a later version of the protocol.
        Malformed: it is not a header, a field is out of its range, or its version does not have session keys.
    """
    if len(frame) > MAX_HEADER:
        raise Oversized(f"header of {len(frame)} bytes (at most {MAX_HEADER})")
    if not len(frame):
        raise Malformed("empty header")
    view = memoryview(frame)
    if view[0] not in (VERSION_1, VERSION):
        raise VersionMismatch(f"the peer speaks protocol version {view[0]}, this is version {VERSION}")
    try:
        header: AnyHeader = _header_decoder.decode(view[1:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"header: {error}") from None
    if view[0] == VERSION_1 and _names_key(header):
        raise Malformed("header: a session key in a header of version 1")
    return header


def _names_key(header: Header) -> bool:
    return isinstance(header, Relay | Bounce) and isinstance(header.session, bytes)


def _is_of_version_2(header: Header) -> bool:
    return isinstance(header, Announce) or _names_key(header)


def session_label(session: SessionRef) -> str:
    """How logs name a session: by the first 8 hexadecimal digits of its key, or by its number."""
    return session[:4].hex() if isinstance(session, bytes) else str(session)


def echo(header: Relay, body: bytes) -> bytes:
    """Returns the body of an `UNKNOWN`: a digest (32 bytes) of the message that it answers, as it arrived."""
    return hashlib.blake2b(header.sender + header.associated_data() + body, digest_size=32).digest()


def check_body(frame: _Sized) -> _Sized:
    """Returns the second frame of a message unchanged.

    Raises:
        Oversized: it is larger than `MAX_BODY`.
    """
    if len(frame) > MAX_BODY:
        raise Oversized(f"body of {len(frame)} bytes (at most {MAX_BODY})")
    return frame
